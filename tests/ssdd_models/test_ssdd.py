"""SSDD against the golden values of the architecture, and what it does beyond them."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssdd_models import flow
from ssdd_models.cpu_kernels import group_norm
from ssdd_models.encoder import Encoder, EncoderConfig, Posterior
from ssdd_models.layers import Upsample, timestep_embedding
from ssdd_models.ssdd import SSDD, SSDDConfig
from ssdd_models.uvit import SIZES, AdaGroupNorm, AdaLayerNorm, ResidualBlock, TransformerBlock, UViT
from tests.reference import CASES, GOLDEN, TOLERANCE, filled, full_shapes, inputs, manifest, model, noise
from tokbench.data.pixels import quantise
from tokbench.training.optimisation import recompute

UNITS = np.load(GOLDEN / "units.npz")
TINY = {"encoder": EncoderConfig(8, 4, 32), "decoder": replace(SIZES["XS"], widths=(32, 32, 32, 32), layers=2, heads=2)}


def tiny(**options: object) -> SSDD:
    torch.manual_seed(0)
    built = SSDD(**{**TINY, **options}).eval()
    for parameter in built.parameters():  # as initialised, blocks do nothing
        torch.nn.init.normal_(parameter, std=0.1)
    return built


def unit(name: str) -> Tensor:
    return torch.from_numpy(UNITS[name])


EXACT = 1e-5  # of the largest value: 80 float32 roundings, as few hundred terms summed in any order may differ


def assert_equal(ours: Tensor, golden: np.ndarray | Tensor, tolerance: float = TOLERANCE) -> None:
    """Equal to within a share of the largest value, for which kernel sums in which order is the processor's choice."""
    expected = torch.as_tensor(golden)
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("case", [c for c in CASES if "steps" in c], ids=lambda case: case["file"])
@torch.no_grad()
def test_encode_velocity_and_decode_equal_the_golden_values(case: dict) -> None:
    built, golden = model(case), np.load(GOLDEN / case["file"])
    x, eps = inputs(case)
    posterior = built.encode(x)
    z = posterior.mode()
    assert_equal(z, golden["z_mode"])
    assert_equal(posterior.logvar, golden["z_logvar"])
    assert posterior.kl().numpy() == pytest.approx(golden["kl"], rel=1e-4)
    for steps in case["steps"]:
        assert_equal(built.decode(z, steps=steps, noise=eps), golden[f"x_steps{steps}"])
    t = torch.full((len(x),), 0.3)
    assert_equal(built(flow.interpolate(x, eps, t), t, z), golden["v_t0.3"])


def test_training_loss_prediction_and_gradients_equal_the_golden_values() -> None:
    case = next(c for c in CASES if "t" in c)
    golden = np.load(GOLDEN / case["file"])
    norms = json.loads((GOLDEN / case["file"].replace(".npz", "_gradnorms.json")).read_text())
    built = model(case).train()
    x, eps = inputs(case)
    t = torch.tensor(case["t"])
    posterior = built.encode(x)
    z, x_t = posterior.mode(), flow.interpolate(x, eps, t)
    v = built(x_t, t, z)
    loss, kl = F.mse_loss(v, x - eps), posterior.kl().mean()
    assert loss.item() == pytest.approx(float(golden["loss"]), rel=TOLERANCE)
    assert kl.item() == pytest.approx(float(golden["kl_mean"]), rel=TOLERANCE)
    assert_equal(v.detach(), golden["v_pred"])
    assert_equal(flow.predict_clean(x_t, v, t).detach(), golden["x0_pred"])
    (loss + 1e-6 * kl).backward()
    squares = {name: parameter.grad.square().sum().item() for name, parameter in built.named_parameters()}
    assert sum(squares.values()) ** 0.5 == pytest.approx(norms["total"], rel=1e-4)
    assert {k: v**0.5 for k, v in squares.items()} == pytest.approx(norms["norms"], rel=2e-3, abs=1e-6)
    ones = torch.ones(len(x))
    with torch.no_grad():
        v = built(eps, ones, z)
    assert_equal(flow.predict_clean(eps, v, ones), golden["x0_pred_t1"])
    assert F.mse_loss(v, x - eps).item() == pytest.approx(float(golden["loss_t1"]), rel=TOLERANCE)


def test_keys_and_shapes_are_those_of_the_manifest() -> None:
    known = manifest()
    for name in known:
        kind, _, size = name.partition("_")
        if size and kind != "z4":  # its shapes are checked below
            continue
        with torch.device("meta"):
            part = UViT(SIZES[size], 4) if size else Encoder(EncoderConfig.parse(name))
        assert {key: list(value.shape) for key, value in part.state_dict().items()} == known[name]["shapes"], name
        assert sum(parameter.numel() for parameter in part.parameters()) == known[name]["params"], name


def test_latent_channels_change_only_the_two_layers_that_read_them() -> None:
    known = manifest()
    for name, record in known.items():
        kind, _, size = name.partition("_")
        expected = dict(known[f"z4_{size}"]["shapes"]) if size else {}
        for key, given in (("conv_in.weight", 3), ("ada_ctx_proj.0.weight", 0)):
            if size:
                out, _, *kernel = expected[key]
                expected[key] = [out, given + int(kind[1:]), *kernel]
        assert not size or record["shapes"] == expected, name
    with torch.device("meta"):
        for channels in (3, 16, 32, 64):
            part = UViT(SIZES["XS"], channels)
            assert {k: list(v.shape) for k, v in part.state_dict().items()} == known[f"z{channels}_XS"]["shapes"]


def test_units_equal_the_golden_values() -> None:
    for name in (n for n in UNITS if n.startswith("tsteps")):
        steps, shift = name.removeprefix("tsteps_n").split("_p")
        assert_equal(torch.tensor(flow.sampler_times(int(steps), float(shift))), unit(name), 1e-7)
    for dim in (32, 64):
        # The sine of an angle is as exact as the angle, and that is rounded at its own size.
        rounding = 2 * torch.finfo(torch.float32).eps * unit("temb_in").abs().max().item()
        assert_equal(timestep_embedding(unit("temb_in"), dim), unit(f"temb_{dim}"), rounding)
    gauss = Posterior(40 * noise(5, 2, 8, 2, 2))
    assert_equal(gauss.mode(), unit("gauss_mode"), 0)
    torch.testing.assert_close(gauss.std, unit("gauss_std"), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gauss.kl(), unit("gauss_kl"), rtol=1e-5, atol=0)
    assert_equal(quantise(unit("to_rgb_in"), "nearest") / 255, unit("to_rgb"), 1e-6)


@torch.no_grad()
def test_adaptive_norms_equal_the_golden_values() -> None:
    group = filled(AdaGroupNorm(8, 32, 16), "unit.agn.")
    layer = filled(AdaLayerNorm(8, 24), "unit.aln.")
    ctx = noise(77, 2, 8, 4, 4)
    for r in (1, 2):
        assert_equal(group(noise(78 + r, 2, 32, 4 * r, 4 * r), group.modulation(ctx)), unit(f"agn_r{r}"), EXACT)
        tokens = F.interpolate(F.silu(ctx), scale_factor=float(r)).flatten(2).transpose(1, 2)
        assert_equal(layer(noise(88 + r, 2, 16 * r * r, 24), layer.modulation(tokens)), unit(f"aln_r{r}"), EXACT)


def test_posterior_sample_is_mean_plus_deviation_times_noise() -> None:
    gauss, eps = Posterior(noise(5, 2, 8, 2, 2)), noise(6, 2, 4, 2, 2)
    assert_equal(gauss.sample(eps), gauss.mean + gauss.std * eps, 0)


def test_enlarging_by_a_transposed_convolution_is_the_convolution_of_the_enlargement() -> None:
    layer, x = filled(Upsample(6)), noise(1, 2, 6, 5, 7)
    assert_equal(layer(x), layer.conv(F.interpolate(x, scale_factor=2.0)), EXACT)


def test_decoding_is_the_same_with_and_without_gradients_and_memory_formats() -> None:
    built, z, eps = tiny(), noise(1, 2, 4, 4, 5), noise(2, 2, 3, 32, 40)
    expected = eps + built(eps, torch.ones(2), z)
    assert_equal(built.decode(z, 1, eps), expected.detach(), EXACT)
    assert_equal(built.to(memory_format=torch.channels_last).decode(z, 1, eps), expected.detach(), EXACT)
    recompute(built, (ResidualBlock, TransformerBlock))
    assert_equal(eps + built(eps, torch.ones(2), z), expected, EXACT)


def test_a_batch_is_decoded_like_its_images() -> None:
    built, z, eps = tiny(), noise(1, 3, 4, 4, 4), noise(2, 3, 3, 32, 32)
    single = [built.decode(z[i : i + 1], 2, eps[i : i + 1]) for i in range(3)]
    assert_equal(built.decode(z, 2, eps), torch.cat(single), EXACT)


def test_the_relative_bias_is_never_frozen() -> None:
    built, z, eps = tiny(), noise(1, 1, 4, 8, 8), noise(2, 1, 3, 64, 64)
    before = built.decode(z, 1, eps)
    for name, parameter in built.named_parameters():
        if name.endswith("relative_bias_table"):
            parameter.data.normal_(generator=torch.Generator().manual_seed(1))
    after = built.decode(z, 1, eps)
    assert (after - before).abs().max() > 1e-5
    built(eps, torch.ones(1), z).square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for n, p in built.named_parameters() if n.endswith("relative_bias_table"))


@pytest.mark.parametrize(("encoder", "size"), [("f8c4", (40, 200)), ("f16c4", (32, 208)), ("f8c4", (16, 16))])
def test_any_aspect_and_grids_smaller_than_the_window_work(encoder: str, size: tuple[int, int]) -> None:
    built = tiny(encoder=EncoderConfig.parse(encoder, width=32))
    x = noise(3, 1, 3, *size).clamp(-1, 1)
    z = built.encode(x).mode()
    decoded = built.decode(z, 2, noise(4, 1, 3, *size))
    assert decoded.shape == x.shape
    assert decoded.isfinite().all()


def test_a_transposed_image_decodes_to_the_transposed_result_of_transposed_weights() -> None:
    built, z, eps = tiny(), noise(1, 1, 4, 4, 24), noise(2, 1, 3, 32, 192)
    expected = built.decode(z, 1, eps)
    for parameter in built.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.mT.contiguous()
        elif parameter.ndim == 3:
            parameter.data = parameter.data.transpose(0, 1).contiguous()
    assert_equal(built.decode(z.mT, 1, eps.mT).mT, expected, EXACT)


def test_the_context_of_an_f4_encoder_is_resized_to_the_transformers_grid() -> None:
    built = tiny(encoder=EncoderConfig.parse("f4c3", width=32))
    assert built.size_multiple == 8
    z, eps = noise(1, 1, 3, 16, 18), noise(2, 1, 3, 64, 72)
    condition = built.decoder.condition(z, (64, 72))
    ctx = built.decoder.ada_ctx_proj(z)[:, :, ::2, ::2]
    block = built.decoder.mid_block.transformer_blocks[0]
    assert_equal(condition.modulations[8], block.norm1.linear(F.silu(ctx).flatten(2).transpose(1, 2)), EXACT)
    assert built.decode(z, 1, eps).isfinite().all()


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="60 x 64: both sides must be multiples of 8"):
        tiny(encoder=EncoderConfig(4, 3, 32))(noise(1, 1, 3, 60, 64), torch.ones(1), noise(1, 1, 3, 15, 16))
    with pytest.raises(ValueError, match=r"noise \(1, 3, 8, 8\): latents \(1, 4, 2, 2\) need \(1, 3, 16, 16\)"):
        tiny().decode(noise(1, 1, 4, 2, 2), 1, noise(1, 1, 3, 8, 8))
    for wrong in ({"encoder": "f8"}, {"encoder": "f6c4"}, {"decoder": "XXL"}, {"z_mean": (1.0, 2.0)}):
        with pytest.raises(ValueError):
            tiny(**wrong)


def test_the_decoder_reads_normalised_latents() -> None:
    plain, z, eps = tiny(), noise(1, 1, 4, 4, 4), noise(2, 1, 3, 32, 32)
    scaled = tiny(z_mean=(1.0, 2.0, 3.0, 4.0), z_std=0.5)
    assert scaled.state_dict().keys() == plain.state_dict().keys()
    mean = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, -1, 1, 1)
    assert_equal(scaled.decode(0.5 * z + mean, 1, eps), plain.decode(z, 1, eps), EXACT)
    assert_equal(scaled.sample(z, eps, 1), plain.decode(z, 1, eps), EXACT)


def test_fan_in_initialisation_keeps_the_signal_of_narrow_encoders() -> None:
    torch.manual_seed(0)
    x = noise(1, 2, 3, 64, 64)
    stds = {init: Encoder(EncoderConfig(8, 4, 32), init)(x).std().item() for init in ("normal", "fan-in")}
    assert stds["normal"] < 0.05
    assert 0.3 < stds["fan-in"] < 3


def test_a_new_decoder_starts_without_its_blocks() -> None:
    decoder = UViT(SIZES["XS"])
    blocks = [module for module in decoder.modules() if type(module).__name__ == "ResidualBlock"]
    assert len(blocks) == 20
    assert all(block.conv2.weight.count_nonzero() == 0 for block in blocks)
    assert all(b.ff["proj_out"].weight.count_nonzero() == 0 for b in decoder.mid_block.transformer_blocks)


def test_configurations_are_read_from_shapes() -> None:
    for encoder, size in (("f4c3", "S"), ("f8c4", "G"), ("f16c16", "XL"), ("f32c64", "XS")):
        found = SSDDConfig.from_shapes(full_shapes(encoder, size))
        assert found == SSDDConfig(EncoderConfig.parse(encoder), SIZES[size])
    with pytest.raises(ValueError, match=r"no tensor 'decoder\.down_blocks"):
        SSDDConfig.from_shapes({"conv_in.weight": (1, 1)})


def test_bfloat16_decodes_to_nearly_the_same_image() -> None:
    case = next(c for c in CASES if c["file"] == "f8c4_XS_64x64_b2.npz")
    built = model(case)
    _, eps = inputs(case)
    z = torch.from_numpy(np.load(GOLDEN / case["file"])["z_mode"])
    with torch.autocast("cpu", torch.bfloat16):
        half = built.decode(z, 1, eps)
    assert half.dtype == torch.float32
    assert (half - built.decode(z, 1, eps)).square().mean().sqrt() < 0.02


@pytest.mark.parametrize("shape", [(2, 12, 8, 6, 4, 3, 2), (3, 12, 4, 4, 1, 1, 1), (2, 12, 4, 4, 4, 4, 2)])
def test_our_group_norm_and_its_gradients_equal_pytorchs(shape: tuple[int, ...]) -> None:
    batch, channels, height, width, rows, columns, own = shape
    torch.manual_seed(0)
    x = torch.randn(batch, channels, height, width, dtype=torch.float64, requires_grad=True)
    scale, shift = (torch.randn(own, channels, rows, columns, dtype=torch.float64, requires_grad=True) for _ in "ab")
    wide = [F.interpolate(m, size=(height, width)) for m in (scale, shift)]
    expected = F.group_norm(x, 4, eps=1e-5) * wide[0] + wide[1]
    ours = group_norm(x, 4, scale, shift, EXACT)
    assert_equal(ours, expected, 1e-12)
    with torch.no_grad():
        assert_equal(group_norm(x, 4, scale, shift, 1e-5), expected, 1e-12)
    weight, given = torch.randn_like(x), (x, scale, shift)
    grads = (torch.autograd.grad(y, given, weight) for y in (ours, expected))
    for one, other in zip(*grads, strict=True):
        assert_equal(one, other, 1e-12)


@pytest.mark.parametrize(("side", "rows", "batch"), [(512, 64, 1), (200, 25, 2), (128, 1, 2)])
def test_group_norm_is_accurate_on_large_images(side: int, rows: int, batch: int) -> None:
    torch.manual_seed(0)
    x = (torch.randn(batch, 8, side, side) + 1).to(memory_format=torch.channels_last)
    scale, shift = torch.randn(batch, 8, rows, rows), torch.randn(batch, 8, rows, rows)
    wide = [F.interpolate(m.double(), size=(side, side)) for m in (scale, shift)]
    expected = (F.group_norm(x.double(), 4) * wide[0] + wide[1]).float()
    with torch.no_grad():
        assert_equal(group_norm(x, 4, scale, shift, 1e-5), expected, 3e-5)
    assert_equal(group_norm(x, 4, scale, shift, 1e-5), expected, 3e-5)
