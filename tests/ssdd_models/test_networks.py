"""SSDD's networks against the golden values of the architecture, and what they do beyond them; its attention."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssdd_models import flow
from ssdd_models.attention import (
    BLOCK,
    RADIUS,
    Form,
    choose_form,
    cut,
    make_layout,
    relative_bias,
    table_index,
    windowed_attention,
)
from ssdd_models.cpu_kernels import group_norm
from ssdd_models.encoder import Encoder, EncoderConfig, Posterior
from ssdd_models.layers import Upsample, timestep_embedding
from ssdd_models.ssdd import SSDD, SSDDConfig
from ssdd_models.uvit import SIZES, AdaGroupNorm, AdaLayerNorm, ResidualBlock, TransformerBlock, UViT
from tests.reference import CASES, GOLDEN, TOLERANCE, fill, filled, full_shapes, inputs, manifest, model, noise
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


def test_keys_shapes_and_sizes_are_those_of_the_manifest() -> None:
    known = manifest()
    for name, expected in known.items():
        channels, _, size = name.partition("_")
        if size and channels != "z4" and size != "XS":  # of the same sizes with other latents one will do
            continue
        with torch.device("meta"):
            part = UViT(SIZES[size], int(channels[1:])) if size else Encoder(EncoderConfig.parse(name))
        assert {key: list(value.shape) for key, value in part.state_dict().items()} == expected["shapes"], name
        assert sum(parameter.numel() for parameter in part.parameters()) == expected["params"], name


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


# ---- windowed attention: every form equals the definition, and the blocked one grows no faster than the grid -----

CPU = torch.device("cpu")
GRIDS = [(8, 8), (3, 5), (12, 40), (23, 24), (32, 32), (33, 29), (9, 64)]


def offsets(size: int) -> Tensor:
    return table_index(torch.arange(size)[:, None] - torch.arange(size))


def defined(q: Tensor, k: Tensor, v: Tensor, table: Tensor, height: int, width: int) -> Tensor:
    """The definition: a bias for every pair of positions."""
    bias = relative_bias(table, offsets(height), offsets(width))
    q, k, v = (x.unflatten(2, (table.shape[-1], -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5 + bias
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def drawn(height: int, width: int, device: torch.device = CPU, dim: int = 32) -> list[Tensor]:
    torch.manual_seed(height * width)
    shapes = [(2, height * width, dim)] * 3 + [(15, 15, 2)]
    return [torch.randn(shape, device=device).requires_grad_() for shape in shapes]


def test_relative_bias_equals_the_golden_values() -> None:
    table, units = fill("unit.relative_bias_table", (15, 15, 2)), np.load(GOLDEN / "units.npz")
    for grid in (8, 12):
        bias = relative_bias(table, offsets(grid), offsets(grid))
        torch.testing.assert_close(bias, torch.from_numpy(units[f"relbias_grid{grid}"]))


@pytest.mark.parametrize("form", ["dense", "blocked"])
@pytest.mark.parametrize("grid", GRIDS)
def test_forms_and_their_gradients_equal_the_definition(grid: tuple[int, int], form: Form) -> None:
    given = drawn(*grid)
    expected = defined(*given, *grid)
    layout = make_layout(*grid, CPU, form)
    ours = windowed_attention(*given, layout)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    with torch.no_grad():  # another kernel
        torch.testing.assert_close(windowed_attention(*given, layout), expected, rtol=0, atol=1e-5)
    weight = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(ours, given, weight), torch.autograd.grad(expected, given, weight), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * max(1, other.abs().max().item()))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("grid", [(8, 8), (12, 40), (23, 24), (33, 29)])
@torch.no_grad()
def test_flex_attention_equals_the_definition(grid: tuple[int, int]) -> None:
    given = drawn(*grid)
    ours = windowed_attention(*given, make_layout(*grid, CPU, "flex"))
    torch.testing.assert_close(ours, defined(*given, *grid), rtol=0, atol=1e-5)


@pytest.mark.compiled
@pytest.mark.parametrize("width", [24, 36, 48, 64, 72])  # of a head: those of XS, ..., and no power of two
def test_compiled_flex_attention_and_its_gradients_equal_the_definition(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    given = drawn(23, 24, dim=2 * width)
    expected = defined(*given, 23, 24)
    with torch.no_grad():
        compiled = torch.compile(windowed_attention, dynamic=False, fullgraph=True)
        ours = compiled(*given, make_layout(23, 24, CPU, "flex"))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    # Inductor has no kernel of the gradient for a CPU: the joint graph is traced as for a GPU, and run by torch's own.
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    traced = torch.compile(windowed_attention, dynamic=False, fullgraph=True, backend="aot_eager")
    ours = traced(*given, make_layout(23, 24, CPU, "flex"))
    weight = torch.randn_like(expected)
    grads = torch.autograd.grad(ours, given, weight), torch.autograd.grad(expected, given, weight)
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * max(1, other.abs().max().item()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dim", [48, 80, 128])
@pytest.mark.parametrize("form", ["dense", "blocked", "flex"])
def test_forms_on_cuda_and_their_gradients_equal_the_definition(dim: int, form: Form) -> None:
    device = torch.device("cuda")
    given = drawn(33, 40, device, dim)
    attention = torch.compile(windowed_attention, dynamic=False) if form == "flex" else windowed_attention
    ours = attention(*given, make_layout(33, 40, device, form))
    cpu = [x.detach().cpu().requires_grad_() for x in given]
    expected = defined(*cpu, 33, 40)
    torch.testing.assert_close(ours.cpu(), expected, rtol=0, atol=1e-4)
    weight = torch.randn_like(expected)
    grads = torch.autograd.grad(ours, given, weight.to(device)), torch.autograd.grad(expected, cpu, weight)
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("grid", "device", "form"),
    [((16, 16), "cpu", "blocked"), ((32, 32), "cuda", "dense"), ((33, 16), "cuda", "blocked"),
     ((128, 128), "cuda", "blocked")],
)  # fmt: skip
def test_no_form_needs_a_compiler_where_there_is_none(grid: tuple[int, int], device: str, form: Form) -> None:
    assert choose_form(*grid, torch.device(device)) == form


def test_every_window_lies_in_its_region_and_every_query_in_a_block() -> None:
    for size in range(1, 150):
        axis = cut(size)
        seen = set()
        for run in axis.runs:
            for start in axis.starts(run, CPU).tolist():
                first = start - run.offset
                assert first >= 0
                assert first + axis.region <= size
                for query in range(start, start + axis.block):
                    assert max(query - RADIUS, 0) >= first
                    assert min(query + RADIUS, size - 1) < first + axis.region
                    seen.add(query)
        assert seen == set(range(size))


@pytest.mark.parametrize("grid", [(64, 64), (128, 128), (16, 512)])
def test_pairs_computed_per_position_are_bounded(grid: tuple[int, int]) -> None:
    layout = make_layout(*grid, CPU, "blocked")
    pairs = sum(len(piece.queries) * len(piece.keys) // piece.num for piece in layout.pieces)
    assert pairs <= grid[0] * grid[1] * (BLOCK + 2 * RADIUS) ** 2


def test_half_precision_cannot_overflow_the_mask() -> None:
    given = [x.detach().to(torch.bfloat16) for x in drawn(24, 24)[:3]]
    table = drawn(24, 24)[3].detach()
    assert windowed_attention(*given, table, make_layout(24, 24, CPU)).isfinite().all()
