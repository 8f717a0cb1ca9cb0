"""The diffusion transformer, its flow, samplers and guidance, against closed forms."""

import pytest
import torch
from torch import Tensor

from tokbench.errors import InputError
from tokbench.generation.dit import DiT, DiTConfig, dit_config
from tokbench.generation.flow import draw_times, guided, integrate, noised, velocity
from tokbench.generation.train import flow_loss
from tokbench.runtime.seeding import normal

TINY = DiTConfig(channels=2, patch=2, width=32, depth=2, heads=2, num_classes=3)


@pytest.mark.parametrize(("size", "millions"), [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_parameter_counts_are_the_papers(size: str, millions: int) -> None:
    with torch.device("meta"):
        model = DiT(dit_config(size, patch=2, channels=4, num_classes=1000))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


@pytest.mark.parametrize(("patch", "height", "width"), [(1, 3, 5), (2, 8, 4), (4, 8, 8)])
def test_any_grid_that_the_patch_divides_comes_back_in_its_shape(patch: int, height: int, width: int) -> None:
    model = DiT(DiTConfig(channels=2, patch=patch, width=32, depth=1, heads=2, num_classes=3))
    x = torch.randn(2, 2, height, width)
    assert model(x, torch.rand(2), torch.tensor([0, 3])).shape == x.shape


def test_a_patch_that_does_not_divide_the_grid_is_refused_with_both() -> None:
    with pytest.raises(InputError, match="5 x 4 do not divide into patches of 2"):
        DiT(TINY)(torch.zeros(1, 2, 5, 4), torch.zeros(1), torch.zeros(1, dtype=torch.int64))


def test_an_untrained_model_predicts_zero_and_its_blocks_are_the_identity() -> None:
    model = DiT(TINY)
    assert not model(torch.randn(2, 2, 4, 4), torch.rand(2), torch.tensor([0, 1])).any()
    tokens = torch.randn(2, 4, 32)
    assert torch.equal(model.blocks[0](tokens, torch.randn(2, 32)), tokens)


def test_every_position_of_the_grid_has_its_own_code() -> None:
    codes = DiT(TINY).positions(3, 5, torch.device("cpu"))[0]
    distances = torch.cdist(codes, codes) + torch.eye(15)
    assert distances.min() > 0.1


def test_labels_are_dropped_as_often_as_configured() -> None:
    model = DiT(TINY)
    labels = model.drop_labels(torch.zeros(1000, dtype=torch.int64), torch.arange(1000) / 1000)
    assert int((labels == 3).sum()) == 100


def test_noise_is_at_time_0_and_data_at_time_1() -> None:
    x, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert torch.equal(noised(x, noise, torch.zeros(2)), noise)
    assert torch.equal(noised(x, noise, torch.ones(2)), x)
    middle = noised(x, noise, torch.full((2,), 0.25))
    torch.testing.assert_close(middle + 0.75 * velocity(x, noise), x)


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_the_exact_field_of_one_image_leads_to_it_in_one_step(sampler: str) -> None:
    x, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(integrate(lambda x_t, t: x - noise, noise, 1, sampler), x)


def test_samplers_converge_to_a_gaussians_closed_form_at_their_orders() -> None:
    """For data N(0, s²) the field is linear, x_t (t s² - (1 - t)) / (t² s² + (1 - t)²), and x_1 = s x_0."""
    s2 = 0.25

    def field(x_t: Tensor, t: float) -> Tensor:
        return x_t * (t * s2 - (1 - t)) / (t * t * s2 + (1 - t) ** 2)

    start = torch.ones(1, dtype=torch.float64)

    def error(steps: int, sampler: str) -> float:
        return abs(float(integrate(field, start, steps, sampler)) - s2**0.5)

    assert error(40, "euler") / error(80, "euler") == pytest.approx(2, rel=0.1)
    assert error(40, "heun") / error(80, "heun") == pytest.approx(4, rel=0.2)


def test_times_follow_their_laws() -> None:
    numbers = normal(torch.arange(4000), (1,), device="cpu")[:, 0]
    uniform, logit = draw_times(numbers, "uniform"), draw_times(numbers, "logit-normal")
    assert torch.allclose(uniform.quantile(torch.tensor([0.1, 0.5, 0.9])), torch.tensor([0.1, 0.5, 0.9]), atol=0.03)
    torch.testing.assert_close(torch.special.logit(logit), numbers, atol=1e-4, rtol=1e-4)


def labelled(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """A model whose velocity is its label."""
    return labels.float().view(-1, 1, 1, 1).expand_as(x_t)


def test_guidance_extrapolates_from_the_null_class() -> None:
    x, labels = torch.zeros(2, 1, 2, 2), torch.tensor([1, 2])
    for scale in (0.0, 1.0, 4.0):
        v = guided(labelled, labels, 5, scale)(x, 0.5)[:, 0, 0, 0]
        torch.testing.assert_close(v, 5 + scale * (labels.float() - 5))


def test_guidance_acts_inside_its_interval_only_and_costs_nothing_outside() -> None:
    sizes = []

    def counted(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        sizes.append(len(x_t))
        return labelled(x_t, t, labels)

    field = guided(counted, torch.tensor([1, 2]), 5, 3.0, (0.2, 0.6))
    values = [float(field(torch.zeros(2, 1, 2, 2), t)[0, 0, 0, 0]) for t in (0.1, 0.2, 0.6, 0.7)]
    assert values == [1.0, -7.0, -7.0, 1.0]
    assert sizes == [2, 4, 4, 2]


def test_loss_of_the_exact_velocity_is_zero_and_does_not_depend_on_the_batch() -> None:
    x, labels, seeds = torch.randn(4, 2, 4, 4), torch.tensor([0, 1, 2, 0]), torch.arange(4)
    dit = DiT(TINY)
    noise = normal(seeds, x.shape[1:], device="cpu")
    exact = flow_loss(lambda x_t, t, y: x - noise, dit, x, labels, (seeds, seeds + 9), "uniform")
    assert float(exact) == 0
    torch.manual_seed(0)
    torch.nn.init.normal_(dit.patch_out.weight)
    parts = [flow_loss(dit, dit, x[i : i + 2], labels[i : i + 2], (seeds[i : i + 2],) * 2, "uniform") for i in (0, 2)]
    torch.testing.assert_close(sum(parts) / 2, flow_loss(dit, dit, x, labels, (seeds, seeds), "uniform"))


def test_a_tiny_dit_overfits_8_latents_and_reproduces_them() -> None:
    torch.manual_seed(0)
    targets = torch.randn(8, 2, 4, 4)
    model = DiT(DiTConfig(channels=2, patch=2, width=64, depth=3, heads=2, num_classes=8, label_dropout=0.0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    labels = torch.arange(8).repeat(8)
    for step in range(250):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (250 - step) / 150)
        seeds = torch.arange(64) + 64 * step
        loss = flow_loss(model, model, targets[labels], labels, (seeds, seeds + 10**6), "uniform")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        noise = normal(torch.arange(8) + 10**9, (2, 4, 4), device="cpu")
        made = integrate(guided(model, torch.arange(8), 8, 1.0), noise, 20, "heun")
    nearest = torch.cdist(made.flatten(1), targets.flatten(1)).argmin(1)
    assert nearest.tolist() == list(range(8))
    assert float((made - targets).square().mean()) < 0.05
