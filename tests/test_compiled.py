"""What torch.compile makes of the models: one graph, no second one for the same sizes, and the same numbers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from baselines.kl_vae import KLVAE, ConvDecoderConfig, KLVAEConfig
from ssdd_models.encoder import EncoderConfig
from ssdd_models.losses import flow_losses
from ssdd_models.ssdd import SSDD
from ssdd_models.uvit import DecoderConfig
from tests.conftest import Ran
from tokbench.metrics.perceptual import LPIPS

SMALL, NARROW = EncoderConfig.parse("f8c4"), EncoderConfig(width=32, groups=4)
SIZES = [(64, 64), (64, 96)]


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> None:
    torch._dynamo.reset()


def ssdd() -> tuple[nn.Module, Callable[[int, int], tuple[Tensor, ...]]]:
    """A small decoder and its inputs for images of a size."""
    model = SSDD(SMALL, DecoderConfig((32, 32, 32, 32), 1, 2), external_encoder=True)
    return model.decoder, lambda h, w: (torch.randn(2, 3, h, w), torch.rand(2), torch.randn(2, 4, h // 8, w // 8))


def kl_vae() -> tuple[nn.Module, Callable[[int, int], tuple[Tensor, ...]]]:
    return KLVAE(KLVAEConfig(SMALL, ConvDecoderConfig(32, blocks=1))).decoder, lambda h, w: (
        torch.randn(2, 4, h // 8, w // 8),
    )


@pytest.mark.parametrize("make", [ssdd, kl_vae])
def test_a_decoder_is_one_graph_and_another_only_for_another_size(make: Callable[..., object]) -> None:
    counter = CompileCounter()
    decoder, inputs = make()  # type: ignore[misc]
    compiled = torch.compile(decoder, backend=counter, fullgraph=True, dynamic=False)
    for size in (*SIZES, *SIZES):
        compiled(*inputs(*size))
    assert counter.frame_count == len(SIZES)


def ssdd_step() -> Callable[[Tensor, Tensor], Tensor]:
    """The losses of a step of a small SSDD, of images and noise."""
    model, lpips = SSDD(NARROW, DecoderConfig((32, 32, 32, 32), 1, 2)), LPIPS("alex", safe=True).requires_grad_(False)

    def losses(real: Tensor, noise: Tensor) -> Tensor:
        posterior, t = model.encode(real), torch.ones(len(real))
        z = posterior.sample(torch.ones_like(posterior.mean))
        terms, _, _ = flow_losses(model, z, real, noise, t, real=real, perceptual=lpips)
        return torch.stack([*terms.values(), posterior.kl().mean()]).sum()

    return losses


def kl_vae_step() -> Callable[[Tensor, Tensor], Tensor]:
    model = KLVAE(KLVAEConfig(NARROW, ConvDecoderConfig(32, blocks=1)))

    def losses(real: Tensor, noise: Tensor) -> Tensor:
        posterior = model.encode(real)
        fake = model.decode(posterior.sample(torch.ones_like(posterior.mean)))
        return (fake - real).abs().mean() + posterior.kl().mean()

    return losses


@pytest.mark.compiled
@pytest.mark.parametrize("make", [ssdd_step, kl_vae_step])
def test_a_training_step_is_one_graph_and_another_only_for_another_size_or_batch(
    make: Callable[[], Callable[[Tensor, Tensor], Tensor]],
) -> None:
    counter, losses = CompileCounter(), make()
    compiled = torch.compile(losses, backend=counter, fullgraph=True, dynamic=False)
    shapes = [(2, 3, *SIZES[0]), (2, 3, *SIZES[1]), (3, 3, *SIZES[0])]
    for shape in (*shapes, *shapes):
        compiled(torch.randn(shape), torch.randn(shape))
    assert counter.frame_count == len(shapes)


@pytest.mark.compiled
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("make", [ssdd, kl_vae])
def test_compiled_decoders_and_their_gradients_equal_eager_ones(
    make: Callable[..., object], size: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    decoder, inputs = make()  # type: ignore[misc]
    given = inputs(*size)
    compiled = torch.compile(decoder, fullgraph=True, dynamic=False)
    ours, theirs = compiled(*given), decoder(*given)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    parameters = [parameter for parameter in decoder.parameters() if parameter.requires_grad]
    gradients = (torch.autograd.grad(out.square().mean(), parameters, allow_unused=True) for out in (ours, theirs))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.compiled
def test_compiled_training_goes_through_a_score_and_the_start_of_the_gan(
    photographs: Path, tokbench: Callable[..., Ran], tmp_path: Path
) -> None:
    ran = tokbench(
        "train", "klvae", "--preset", "small", "--data", photographs, "--out", tmp_path, "run.compile=true",
        "run.steps=3", "run.batch_size=2", "run.device=cpu", "run.dtype=float32", "run.eval_every=1", "run.held_out=1",
        "run.eval_resolution=40", "run.eval_metrics=psnr", "run.best_by=psnr", "gan.weight=0.5", "gan.start_step=1",
        "gan.width=8", "crops.size=32", "crops.short_side=32,32", "perceptual_weight=0", "model.encoder.width=32",
        "model.decoder.width=32", "model.decoder.blocks=1",
    )  # fmt: skip
    assert ran.status == 0, ran.err
