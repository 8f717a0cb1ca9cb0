"""The CUDA path on a machine without a card: the real code on fake CUDA tensors, which have all but data.

A value that is read back (`item`, `tolist`, `if tensor`) raises; what is copied between host and device is counted.
Backward passes are not run: autograd's threads want a driver.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode

from baselines.kl_vae import KLVAE, ConvDecoderConfig, KLVAEConfig, KLVAETokenizer, PatchGAN
from ssdd_models import flow
from ssdd_models.encoder import EncoderConfig
from ssdd_models.layers import Discriminator
from ssdd_models.losses import critic_loss, flow_losses, generator_loss, training_times
from ssdd_models.ssdd import SSDD
from ssdd_models.tokenizer import SSDDTokenizer
from tokbench.data.pixels import quantise
from tokbench.generation.dit import DiT, dit_config
from tokbench.generation.flow import guided, integrate
from tokbench.metrics.perceptual import DISTS, LPIPS
from tokbench.runtime.device import precision, prepare
from tokbench.tokenizer import Tokenizer

if TorchVersion(torch.__version__) < "2.14":
    pytest.skip("fake CUDA tensors want a driver before torch 2.14", allow_module_level=True)

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
SIZES = [(128, 128), (256, 256), (512, 512), (256, 384)]


class Copies(TorchDispatchMode):
    """Lists copies between devices that wait for both."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not (kwargs or {}).get("non_blocking"):
            given = {x.device.type for x in args if isinstance(x, Tensor) and x.ndim}
            if given and out.device.type not in given:
                self.made.append(f"{func} {tuple(out.shape)} to {out.device.type}")
        return out


@contextlib.contextmanager
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Copies]:
    """Tensors made inside hold nothing; autocast for CUDA works although there is none."""
    times = {steps: flow.sampler_times(steps) for steps in (1, 8)}  # computed on the CPU, of real numbers
    monkeypatch.setattr(flow, "sampler_times", lambda steps, shift=2.0: times[steps])
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    with FakeTensorMode(allow_non_fake_inputs=True), Copies() as copies:
        yield copies


def moved(network: nn.Module) -> nn.Module:
    """A network of the meta device to fake CUDA, its memory formats kept."""
    for module in network.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None:
                    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=CUDA)
                    store[name] = nn.Parameter(fake) if isinstance(tensor, nn.Parameter) else fake
    return network


def empty(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make().to(memory_format=torch.channels_last)


def batch(size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Images uint8 [2, 3, H, W] and seeds int64 [2]"""
    return torch.empty(2, 3, *size, dtype=torch.uint8, device=CUDA), torch.empty(2, dtype=torch.int64, device=CUDA)


def kl_vae() -> KLVAE:
    return KLVAE(KLVAEConfig(EncoderConfig.parse("f8c4"), ConvDecoderConfig()))


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    **{f"ssdd-{size}": lambda size=size: SSDDTokenizer(empty(lambda: SSDD("f8c4", size)), 1)
       for size in ("XS", "S", "B", "M", "L", "XL", "H")},
    "ssdd-S-8-steps": lambda: SSDDTokenizer(empty(lambda: SSDD("f8c4", "S")), 8),
    "ssdd-f16c4": lambda: SSDDTokenizer(empty(lambda: SSDD("f16c4", "S")), 1),
    "klvae": lambda: KLVAETokenizer(empty(kl_vae), {}),
}  # fmt: skip
CASES = [(name, size, torch.float32) for name in ("ssdd-S", "klvae") for size in SIZES]
CASES += [(name, (128, 128) if "steps" in name else (256, 256), torch.bfloat16) for name in TOKENIZERS]


@pytest.mark.parametrize(("name", "size", "dtype"), CASES)
def test_tokenizers_stay_on_the_device_and_never_wait_for_it(
    name: str, size: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = TOKENIZERS[name]()
    with fake_cuda(monkeypatch) as copies:
        for network in tokenizer.networks.values():
            moved(network)
        images, seeds = batch(size)
        with precision(CUDA, dtype):
            latents = tokenizer.encode(images, sample=True, seeds=seeds)
            decoded = tokenizer.decode(latents, seeds=seeds, size=size)
            fake = quantise(decoded, "nearest")
        assert copies.made == []
        assert (fake.shape, fake.device.type, fake.dtype) == (images.shape, "cuda", torch.uint8)
        assert latents.dtype == decoded.dtype == torch.float32


@pytest.mark.parametrize(
    "tokenizer", [SSDDTokenizer(SSDD("f8c4", "XS"), 1), KLVAETokenizer(kl_vae(), {})], ids=["ssdd", "klvae"]
)
def test_everything_between_convolutions_keeps_channels_last(tokenizer: Tokenizer) -> None:
    """With real numbers: a fake convolution has no library that would choose a format."""
    strayed: list[str] = []

    def look(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        if not given[0].is_contiguous(memory_format=torch.channels_last):
            strayed.append(f"{module} from {given[0].shape[1]}")

    prepare(tokenizer, CPU)
    for network in tokenizer.networks.values():
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(look)
    images, seeds = torch.zeros(2, 3, 64, 64, dtype=torch.uint8), torch.arange(2)
    with precision(CPU, torch.float32):
        latents = tokenizer.encode(images, sample=False, seeds=seeds)
        tokenizer.decode(latents, seeds=seeds, size=(64, 64))
    # images and latents arrive as they are, and have few channels
    assert all(name.endswith(("from 3", "from 4")) for name in strayed)
    assert len(strayed) <= 2


@pytest.mark.parametrize("make", [lambda: LPIPS("alex"), lambda: LPIPS("vgg"), DISTS], ids=["alex", "vgg", "dists"])
def test_networks_of_metrics_stay_on_the_device(make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    network = empty(make)
    with fake_cuda(monkeypatch) as copies, precision(CUDA, torch.float32):
        real, fake = torch.empty(2, 2, 3, 256, 256, device=CUDA)
        scores = moved(network)(real, fake)
        assert (scores.shape, scores.device.type) == ((2,), "cuda")
        assert copies.made == []


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_sampling_a_generator_stays_on_the_device(guidance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    dit = empty(lambda: DiT(dit_config("B", patch=2, channels=4, num_classes=1000)))
    with fake_cuda(monkeypatch) as copies, precision(CUDA, torch.bfloat16):
        moved(dit)
        noise, labels = torch.empty(2, 4, 32, 32, device=CUDA), torch.empty(2, dtype=torch.int64, device=CUDA)
        latents = integrate(guided(dit, labels, 1000, guidance), noise, 4, "heun")
        assert (latents.shape, latents.device.type) == (noise.shape, "cuda")
        assert copies.made == []


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_losses_of_a_step_of_ssdd_stay_on_the_device(compute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, critic, lpips = empty(lambda: SSDD("f8c4", "S")), empty(Discriminator), empty(lambda: LPIPS("vgg"))
    with fake_cuda(monkeypatch) as copies:
        for network in (model, critic, lpips):
            moved(network)
        real, noise = torch.empty(2, 2, 3, 128, 128, device=CUDA)
        with torch.autocast("cuda", torch.bfloat16, enabled=compute == "bfloat16"):
            t = training_times(torch.empty(2, 2, device=CUDA), 0.1)
            posterior = model.encode(real)
            z = posterior.sample(torch.empty_like(posterior.mean))
            losses, clean, x_t = flow_losses(model, z, real, noise, t, real=real, perceptual=lpips)
            losses |= {"kl": posterior.kl().mean(), "gan": generator_loss(critic, clean, x_t, t)}
            losses["critic"] = critic_loss(critic, real, clean, x_t, t)
        assert {name: loss.dtype for name, loss in losses.items()} == dict.fromkeys(losses, torch.float32)
        assert all(loss.device.type == "cuda" and loss.requires_grad for loss in losses.values())
        assert copies.made == []


def test_losses_of_a_step_of_klvae_stay_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    model, critic = empty(kl_vae), empty(PatchGAN)
    with fake_cuda(monkeypatch) as copies, torch.autocast("cuda", torch.bfloat16):
        moved(model)
        moved(critic)
        real = torch.empty(2, 3, 128, 128, device=CUDA)
        posterior = model.encode(real)
        fake = model.decode(posterior.sample(torch.empty_like(posterior.mean)))
        assert {x.device.type for x in (fake, posterior.kl(), critic(fake))} == {"cuda"}
        assert copies.made == []


def test_what_waits_for_the_device_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_cuda(monkeypatch) as copies:
        tensor = torch.empty(3, device=CUDA)
        tensor.cpu()
        torch.empty(3).to(CUDA)
        assert len(copies.made) == 2
        with pytest.raises(Exception, match="_local_scalar_dense"):
            tensor.sum().item()
        with pytest.raises(Exception, match=r"is_nonzero|_local_scalar_dense"):
            bool(tensor.sum() > 0)
