"""The CUDA path on a machine without a card: the real code on fake CUDA tensors (tests/fake_cuda.py)."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokbench.training.session
from baselines import train as klvae_training
from baselines.kl_vae import KLVAE, ConvDecoderConfig, KLVAEConfig, KLVAETokenizer
from ssdd_models import train as ssdd_training
from ssdd_models.encoder import EncoderConfig
from ssdd_models.losses import DINO_DIM, Repa
from ssdd_models.ssdd import SSDD
from ssdd_models.tokenizer import SSDDTokenizer
from ssdd_models.uvit import SIZES as DECODERS
from ssdd_models.uvit import DecoderConfig
from tests.fake_cuda import CPU, CUDA, Waited, empty, fake_cuda, gradients, moved
from tokbench import weights
from tokbench.config import override
from tokbench.data.pixels import quantise
from tokbench.evaluation.reconstruct import Timer, append_scores, latent_columns, measure, round_trip
from tokbench.generation.dit import DiT, dit_config
from tokbench.generation.flow import guided, integrate
from tokbench.generation.latents import Normaliser
from tokbench.generation.train import flow_loss
from tokbench.metrics import pixel
from tokbench.metrics.dreamsim import DreamSim
from tokbench.metrics.extractors import DINOv2, Inception, MobileNet
from tokbench.metrics.perceptual import DISTS, LPIPS
from tokbench.metrics.suite import MetricSuite, NetworkScorer
from tokbench.records.measurement import Measurement
from tokbench.registry import TrainOptions
from tokbench.runtime.device import precision, prepare, to_host
from tokbench.tokenizer import Tokenizer, checks_deferred
from tokbench.training.optimisation import (
    Ema,
    EmaConfig,
    OptimConfig,
    make_optimizer,
    optimizer_step,
    schedule_free_average,
)
from tokbench.training.session import Session, Step

SIZES = [(128, 128), (256, 256), (512, 512), (256, 384)]


def batch(size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Images uint8 [2, 3, H, W] and seeds int64 [2]"""
    return torch.empty(2, 3, *size, dtype=torch.uint8, device=CUDA), torch.empty(2, dtype=torch.int64, device=CUDA)


TINY = {"encoder": EncoderConfig(8, 4, 32, 4), "decoder": DecoderConfig((32, 32, 32, 32), 1, 2, 4)}
TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    **{f"ssdd-{size}": lambda size=size: SSDDTokenizer(empty(lambda: SSDD("f8c4", size)), 1)
       for size in ("XS", "S", "B", "M", "L", "XL", "H")},
    "ssdd-f16c4": lambda: SSDDTokenizer(empty(lambda: SSDD("f16c4", "S")), 1),
    "ssdd-tiny": lambda: SSDDTokenizer(empty(lambda: SSDD(**TINY, z_mean=0.5)), 1),  # type: ignore[arg-type]
    "klvae": lambda: KLVAETokenizer(empty(lambda: KLVAE(KLVAEConfig())), {}),
}  # fmt: skip
BRIEF = [("ssdd-tiny", (256, 256), torch.bfloat16), ("klvae", (256, 384), torch.bfloat16)]
ALL = [(name, size, torch.bfloat16) for name in TOKENIZERS for size in SIZES]
ALL += [(name, size, torch.float32) for name in ("ssdd-S", "klvae") for size in SIZES]


@pytest.mark.parametrize(
    ("name", "size", "dtype"), [*BRIEF, *(pytest.param(*case, marks=pytest.mark.compiled) for case in ALL)]
)
def test_tokenizers_stay_on_the_device_and_never_wait_for_it(
    name: str, size: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer: Any = TOKENIZERS[name]()
    with fake_cuda(monkeypatch) as watch:
        for network in tokenizer.networks.values():
            moved(network)
        images, seeds = batch(size)
        with precision(CUDA, dtype):
            latents = tokenizer.encode(images, sample=True, seeds=seeds)
            for steps in (1, 8) if tokenizer.info.decode_steps else (None,):
                tokenizer.steps = steps
                decoded = tokenizer.decode(latents, seeds=seeds, size=size)
                fake = quantise(decoded, "nearest")
                assert (fake.shape, fake.device.type, fake.dtype) == (images.shape, "cuda", torch.uint8)
                assert latents.dtype == decoded.dtype == torch.float32
        assert watch.waited == []
        assert watch.products == {dtype}


@pytest.mark.parametrize(
    ("name", "size"), [*zip(("S", "B", "M", "L", "XL", "H"), (SIZES[2], *SIZES, *SIZES), strict=False)]
)
def test_decoders_of_every_size_stay_on_the_device(
    name: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one step and with one layer; all of it is above, for those who have minutes. XS is trained below."""
    model = empty(lambda: SSDD("f8c4", replace(DECODERS[name], layers=1), external_encoder=True))
    with fake_cuda(monkeypatch) as watch, precision(CUDA, torch.bfloat16):
        tokenizer = SSDDTokenizer(moved(model), 1)  # type: ignore[arg-type]
        images, seeds = batch(size)
        latents = torch.empty(2, 4, size[0] // 8, size[1] // 8, device=CUDA)
        decoded = tokenizer.decode(latents, seeds=seeds, size=size)
        assert (decoded.shape, decoded.device.type, decoded.dtype) == (images.shape, "cuda", torch.float32)
        assert watch.waited == []
        assert watch.products == {torch.bfloat16}


@pytest.mark.parametrize(
    "tokenizer",
    [
        SSDDTokenizer(SSDD(**TINY), 1),  # type: ignore[arg-type]
        KLVAETokenizer(KLVAE(KLVAEConfig(TINY["encoder"], ConvDecoderConfig(32, groups=4))), {}),  # type: ignore[arg-type]
    ],
    ids=["ssdd", "klvae"],
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


# ---- metrics and the loop of an evaluation ------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: LPIPS("alex"), lambda: LPIPS("vgg"), DISTS], ids=["alex", "vgg", "dists"])
def test_networks_of_metrics_stay_on_the_device(make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    network = empty(make)
    with fake_cuda(monkeypatch) as watch, precision(CUDA, torch.float32):
        real, fake = torch.empty(2, 2, 3, 256, 256, device=CUDA)
        scores = moved(network)(real, fake)
        assert (scores.shape, scores.device.type) == ((2,), "cuda")
        assert watch.waited == []


def inception(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    monkeypatch.setattr(weights, "load", lambda path: {})
    monkeypatch.setattr(nn.Module, "load_state_dict", lambda *_: None)
    return empty(lambda: Inception(Path()))


def mobilenet(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    monkeypatch.setattr(weights, "load", lambda path: {})
    monkeypatch.setattr(nn.Module, "load_state_dict", lambda *_: None)
    return empty(lambda: MobileNet(Path()))


def dinov2(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    from transformers import Dinov2Config, Dinov2Model

    with torch.device("meta"):
        config = Dinov2Config(hidden_size=64, num_hidden_layers=2, num_attention_heads=1, image_size=518, patch_size=14)
        state = Dinov2Model(config).state_dict()
    monkeypatch.setattr(weights, "load", lambda path: state)
    return empty(lambda: DINOv2(Path()))


def dreamsim(native: bool, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    state = {}
    for part in ("dino", "clip", "open_clip"):
        clip = part != "dino"
        vit = VisionTransformer(embed_dim=64, depth=1, num_heads=1, num_classes=0, pre_norm=clip, device="meta")
        if clip:
            vit.patch_embed.proj = nn.Conv2d(3, 64, 16, 16, device="meta")
        state |= {f"{part}.{key}": tensor for key, tensor in vit.state_dict().items()}
        state[f"{part}.proj"] = torch.empty(64, 32, device="meta")
    return empty(lambda: DreamSim(state, ("dino", "clip", "open_clip"), native=native))


@pytest.mark.parametrize("size", [(256, 256), (256, 384)])
@pytest.mark.parametrize(
    "make", [inception, mobilenet, dinov2, partial(dreamsim, False), partial(dreamsim, True)],
    ids=["inception", "mobilenet", "dinov2", "dreamsim", "dreamsim-native"],
)  # fmt: skip
def test_extractors_stay_on_the_device(
    make: Callable[[pytest.MonkeyPatch], Any], size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        network = make(patch)
    network.eval().requires_grad_(False)
    with fake_cuda(monkeypatch) as watch, precision(CUDA, torch.float32):
        images = moved_input(network, batch(size)[0])
        found = network.features(images) if isinstance(network, DreamSim) else network(images).values()
        assert {features.device.type for features in found} == {"cuda"}
        assert watch.waited == []


def moved_input(network: nn.Module, images: Tensor) -> Tensor:
    moved(network)
    return images.float() if isinstance(network, DreamSim) else images


def test_an_evaluation_sends_one_batch_up_and_one_packed_copy_back_and_waits_a_batch_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One tokenizer, all kinds of metrics; the host waits in the call that keeps the results, and nowhere before."""
    suite = MetricSuite(("psnr", "ssim", "ssim-gauss", "ms-ssim", "latent-std"), 2, 256, CUDA)
    lpips, tokenizer = empty(lambda: LPIPS("alex")), TOKENIZERS["ssdd-tiny"]()
    measurement, kept, casts = Measurement(seeds=(0, 1), dtype="bfloat16"), [], []
    with fake_cuda(monkeypatch) as watch:
        for network in (lpips, *tokenizer.networks.values()):
            moved(network)
        monkeypatch.setattr(pixel, "UNIFORM", torch.empty(7))
        monkeypatch.setattr(pixel, "GAUSSIAN", torch.empty(11))
        suite.scorers.append(NetworkScorer("lpips-alex", lpips))
        suite.extractors = {"features": lambda images: images.float().mean((2, 3))}  # type: ignore[assignment, dict-item]

        def step(ids: Sequence[str], real: Tensor, seeds: Tensor) -> Callable[[], object]:
            real = real.to(CUDA, non_blocking=True)
            watch.sent.clear()
            watch.casts.clear()
            with checks_deferred() as checks:
                fakes, latents = round_trip(tokenizer, (ids, real, seeds), measurement, Timer(CUDA))
            assert {where for where, _ in checks} == {"the latents", "the reconstruction"}
            columns = latent_columns(tokenizer, latents, (256, 256))
            append = append_scores(None, suite, "ssdd", ids, real, fakes, {}, columns, {}, checks)  # type: ignore[arg-type]
            kept.append([copy for copy in watch.sent if copy.endswith("cpu")])
            casts.append(len(watch.casts))
            return append

        images, seeds = torch.empty(2, 3, 256, 256, dtype=torch.uint8), torch.empty(2, 2, dtype=torch.int64)
        with pytest.raises(Waited):
            measure(step, [("ab", images, seeds)] * 3, name="", device=CUDA, limit=2)
    assert watch.waited == []
    assert [len(copies) for copies in kept] == [1, 1]  # the second batch is under way when the first is waited for
    assert casts[0] > casts[1] == 0  # weights


def test_what_comes_back_is_what_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {
        "a": torch.arange(3),
        "b": torch.rand(2, 3),
        "c": torch.tensor([True, False]),
        "d": torch.rand(2).double(),
    }
    (back,) = to_host([tensors])()
    assert {key: array.tolist() for key, array in back.items()} == {key: x.tolist() for key, x in tensors.items()}


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_sampling_a_generator_stays_on_the_device(guidance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    dit = empty(lambda: DiT(dit_config("tiny", patch=2, channels=4, num_classes=1000)))
    with fake_cuda(monkeypatch) as watch, precision(CUDA, torch.bfloat16):
        moved(dit)
        noise, labels = torch.empty(2, 4, 32, 32, device=CUDA), torch.empty(2, dtype=torch.int64, device=CUDA)
        latents = integrate(guided(dit, labels, 1000, guidance), noise, 4, "heun")
        assert (latents.shape, latents.device.type) == (noise.shape, "cuda")
        assert watch.waited == []


# ---- training: one step of each loop, backward included -----------------------------------------------------------


class Stop(Exception):
    """The step is over."""


def repa(model: SSDD, device: torch.device) -> Repa:
    def features(images: Tensor) -> Tensor:
        return images.new_empty(len(images), images.shape[2] // 14 * (images.shape[3] // 14), DINO_DIM)

    return moved(Repa(model.decoder.config.widths[-1], features))  # type: ignore[return-value]


NARROW = ("encoder.width=32", "encoder.groups=4", "decoder.layers=1")
TRAININGS: dict[str, tuple[Any, dict[str, Any], tuple[str, ...]]] = {
    "joint": (ssdd_training, {"decoder": "XS"}, (*NARROW, "weights.gan=0.5", "gan_start=0")),
    "distill": (ssdd_training, {"decoder": "XS", "stage": "distill"}, NARROW),
    "klvae": (klvae_training, {}, ("gan.start_step=0", "model.encoder.width=32", "model.decoder.blocks=1")),
}


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.compiled)])
@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_step_stays_on_the_device(
    name: str, dtype: str, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From uint8 crops to new weights and averages; the one place that may wait is where losses are read."""
    trainer, options, settings = TRAININGS[name]
    chosen = trainer.configure(TrainOptions(str(photographs), tmp_path, **options))
    settings = (
        *settings,
        f"run.dtype={dtype}",
        "run.compile=false",
        "run.log_every=1",
        "run.batch_size=2",
        "run.held_out=0",
        "crops.size=64",
        "crops.late_size=0",
    )
    config = override(chosen, settings)
    update_weights = Step.update

    def update(step: Any, ids: Sequence[str]) -> None:
        assert watch.waited == []
        gradients = {id(p): p.grad for p in step.session.parameters if p.grad is not None}
        assert len(gradients) > 0.9 * len(step.session.parameters)
        assert {g.device.type for g in gradients.values()} == {"cuda"}
        assert {g.dtype for g in gradients.values()} == {torch.float32}
        assert step._terms["loss"].dtype == torch.float32
        assert getattr(torch, dtype) in watch.products
        update_weights(step, ids)

    def read(session: Any) -> None:
        assert watch.waited == []
        raise Stop

    crops = torch.empty(2, 3, 64, 64, dtype=torch.uint8)
    with fake_cuda(monkeypatch) as watch:
        monkeypatch.setattr(nn.Module, "to", moved)
        monkeypatch.setattr(tokbench.training.session, "select_device", lambda *_: CUDA)
        monkeypatch.setattr(Session, "batches", lambda *_: iter([(range(2), crops, ["a", "b"])]))
        monkeypatch.setattr(Step, "update", update)
        monkeypatch.setattr(Session, "read", read)
        monkeypatch.setattr(trainer, "perceptual_loss", lambda *_: moved(LPIPS("vgg", safe=True).requires_grad_(False)))
        monkeypatch.setattr(trainer, "start_from", lambda *_: {})
        monkeypatch.setattr(ssdd_training, "make_repa", repa)
        twin = SimpleNamespace(deepcopy=lambda model: moved(SSDD.from_config(model.config)))
        monkeypatch.setattr(ssdd_training, "copy", twin)
        with pytest.raises(Stop):
            trainer.train(config, TrainOptions(str(photographs), tmp_path, start=tmp_path))


@pytest.mark.parametrize("optimizer", ["adamw", "radam-schedulefree"])
def test_a_generators_step_stays_on_the_device(optimizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, backward, optimiser (AdamW's fused one) and average; latents are normalised by channel."""
    dit = empty(lambda: DiT(dit_config("tiny", patch=2, channels=4, num_classes=1000)))
    normaliser = Normaliser((0.5,) * 4, (2.0,) * 4)
    with fake_cuda(monkeypatch) as watch:
        moved(dit)
        x, labels = torch.empty(2, 4, 32, 32, device=CUDA), torch.empty(2, dtype=torch.int64, device=CUDA)
        seeds = [torch.empty(2, dtype=torch.int64)] * 2
        updates, ema = make_optimizer(dit.named_parameters(), OptimConfig(optimizer)), Ema(dit, EmaConfig(0.9, 0))
        with torch.autocast("cuda", torch.bfloat16):
            loss = flow_loss(dit, dit, normaliser(x), labels, seeds, "logit-normal")
        loss.backward()
        assert {p.grad.device.type for p in dit.parameters() if p.grad is not None} == {"cuda"}
        norm = optimizer_step(updates, list(dit.parameters()), 1e-4, 0.1)
        with schedule_free_average(updates):
            ema.update(0)
        kept = [tensor for state in updates.state.values() for tensor in state.values() if isinstance(tensor, Tensor)]
        assert {tensor.device.type for tensor in (norm, *kept, *ema.shadow.values())} == {"cuda"}
        assert watch.waited == []


# ---- the means themselves -----------------------------------------------------------------------------------------


def test_what_waits_for_the_device_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_cuda(monkeypatch) as watch:
        tensor = torch.empty(3, device=CUDA)
        tensor.cpu()
        torch.empty(3).to(CUDA)
        tensor.to("cpu", non_blocking=True)
        assert (len(watch.waited), len(watch.sent)) == (2, 1)
        with pytest.raises(Exception, match="_local_scalar_dense"):
            tensor.sum().item()
        with pytest.raises(Exception, match=r"is_nonzero|_local_scalar_dense"):
            bool(tensor.sum() > 0)


def test_gradients_without_autograds_engine_are_those_with_it() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 3, 3))
    images, scale = torch.randn(2, 3, 8, 8), torch.randn(3, 1, 1)
    loss = (network(images) * scale + network(images).mean()).square().mean()
    parameters = list(network.parameters())
    for ours, theirs in zip(
        gradients(loss, parameters), torch.autograd.grad(loss, parameters, retain_graph=True), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
