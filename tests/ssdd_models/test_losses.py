"""SSDD's losses against the golden training step, decay groups, REPA, distillation, the first weights."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from baselines.train import KLVAETraining
from ssdd_models.encoder import EncoderConfig, noised
from ssdd_models.layers import Discriminator
from ssdd_models.losses import DINO_DIM, LossWeights, Repa, critic_loss, flow_losses, generator_loss, training_times
from ssdd_models.ssdd import SSDD
from ssdd_models.stages import SSDDTraining
from ssdd_models.train import NOISE, Losses, cancel_noise, make_repa
from ssdd_models.uvit import SIZES
from tests.reference import CASES, GOLDEN, inputs, model
from tokbench.errors import InputError
from tokbench.runtime.seeding import normal
from tokbench.training.optimisation import parameter_groups

CASE = next(case for case in CASES if case["file"].startswith("train_"))
TINY = replace(SIZES["XS"], widths=(32, 32, 32, 32), layers=6, heads=2, groups=4)


@pytest.fixture
def tiny() -> SSDD:
    torch.manual_seed(0)
    built = SSDD(EncoderConfig(4, 4, 32, 4), TINY, init="fan-in")
    for parameter in built.decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return built


def test_losses_predictions_and_gradients_of_a_step_equal_the_golden_ones() -> None:
    built, golden = model(CASE).train(), np.load(GOLDEN / CASE["file"])
    norms = json.loads((GOLDEN / CASE["file"].replace(".npz", "_gradnorms.json")).read_text())
    x, eps = inputs(CASE)
    posterior = built.encode(x)
    kl = posterior.kl().mean()
    for suffix, t in (("_t1", torch.ones(len(x))), ("", torch.tensor(CASE["t"]))):
        losses, clean, _ = flow_losses(built, posterior.mode(), x, eps, t, real=x)
        assert losses["flow"].item() == pytest.approx(float(golden[f"loss{suffix}"]), abs=2e-5)
        torch.testing.assert_close(clean.detach(), torch.from_numpy(golden[f"x0_pred{suffix}"]), atol=2e-4, rtol=0)
    assert kl.item() == pytest.approx(CASE["kl_mean"], rel=1e-5)
    (losses["flow"] + 1e-6 * kl).backward()
    squares = {name: parameter.grad.square().sum().item() for name, parameter in built.named_parameters()}
    assert sum(squares.values()) ** 0.5 == pytest.approx(norms["total"], rel=1e-4)
    assert {k: v**0.5 for k, v in squares.items()} == pytest.approx(norms["norms"], rel=2e-3, abs=1e-6)


@pytest.mark.parametrize("trained", ["encfrozen", "enctrain"])
def test_decay_groups_are_the_golden_lists(trained: str) -> None:
    with torch.device("meta"):
        built = SSDD("f8c4", "S")
    assert built.encoder is not None
    built.encoder.requires_grad_(trained == "enctrain")
    names = {parameter: name for name, parameter in built.named_parameters()}
    golden = json.loads((GOLDEN / f"param_groups_f8c4_S_{trained}.json").read_text())
    groups = parameter_groups(built.named_parameters(), 0.01)
    lists = [sorted(value) for value in golden.values() if isinstance(value, list)]
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0]
    assert [sorted(names[p] for p in group["params"]) for group in groups] == lists


def test_a_share_of_the_times_is_one_and_the_others_are_logit_normal() -> None:
    normals = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0))
    t = training_times(normals, 0.3)
    assert (t == 1).float().mean().item() == pytest.approx(0.3, abs=0.01)
    assert torch.equal(t[t < 1], torch.sigmoid(normals[:, 0])[t < 1])
    assert (training_times(normals, 0.0) < 1).all()
    assert (training_times(normals, 1.0) == 1).all()


def test_distillation_is_onto_the_teachers_sample_from_the_same_noise_and_latent(tiny: SSDD) -> None:
    weights = LossWeights(perceptual=0, repa=0)
    learned = Losses(SSDDTraining(stage="distill", weights=weights, teacher_steps=3), tiny, torch.device("cpu"))
    assert learned.teacher is not None
    assert not any(parameter.requires_grad for parameter in learned.teacher.parameters())
    real, seeds = torch.rand(2, 3, 16, 16), [torch.tensor([k, k + 1]) for k in range(3)]
    losses, clean, x_t, t = learned.denoise(real, seeds, step=1)
    noise, z = normal(seeds[NOISE], (3, 16, 16), device="cpu"), tiny.encode(real).mode().detach()
    assert torch.equal(x_t, noise)
    assert (t == 1).all()
    sample = learned.teacher.decode(z, steps=3, noise=noise)
    assert losses["flow"].item() == pytest.approx(F.mse_loss(clean, sample).item(), rel=1e-5)
    torch.testing.assert_close(clean.detach(), tiny.decode(z, steps=1, noise=noise), atol=1e-5, rtol=1e-5)


def test_repa_compares_the_fifth_block_with_features_of_the_real_image(tiny: SSDD) -> None:
    seen: list[Tensor] = []

    def features(images: Tensor) -> Tensor:
        seen.append(images)
        return torch.randn(2, 4, DINO_DIM, generator=torch.Generator().manual_seed(1))

    repa = Repa(TINY.widths[-1], features)
    real, target = torch.full((2, 3, 16, 16), 1.0), torch.zeros(2, 3, 16, 16)
    noise, z, t = torch.randn(2, 3, 16, 16), torch.randn(2, 4, 4, 4), torch.ones(2)
    losses, _, _ = flow_losses(tiny, z, target, noise, t, repa=repa, real=real)
    losses["repa"].backward()
    assert seen[0].shape == (2, 3, 28, 28)
    assert seen[0][0, 0].mean().item() == pytest.approx((1 - 0.485) / 0.229, rel=1e-3)
    blocks = tiny.decoder.get_submodule("mid_block.transformer_blocks")
    trained = [any(p.grad is not None for p in block.parameters()) for block in blocks.children()]
    assert trained == [True, True, True, True, False, False]  # min(4, 6 // 2): the fourth of six, the fifth of eight
    assert all(p.grad is not None for p in repa.parameters())
    assert not any("features" in name for name in repa.state_dict())


def test_the_discriminator_learns_to_tell_and_the_decoder_moves_only_itself() -> None:
    torch.manual_seed(0)
    critic = Discriminator(width=8)
    real, fake = torch.rand(2, 3, 32, 32), torch.zeros(2, 3, 32, 32, requires_grad=True)
    x_t, t = torch.randn(2, 3, 32, 32), torch.tensor([0.2, 1.0])
    generator_loss(critic, fake, x_t, t).backward()
    assert fake.grad is not None
    assert all(parameter.grad is None for parameter in critic.parameters())
    optimizer = torch.optim.Adam(critic.parameters(), 1e-3)
    first = critic_loss(critic, real, fake, x_t, t)
    for _ in range(20):
        optimizer.zero_grad()
        last = critic_loss(critic, real, fake, x_t, t)
        last.backward()
        optimizer.step()
    assert last < 0.9 * first


def test_repa_without_its_network_says_how_to_get_it(
    tiny: SSDD, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")

    def refuse(name: str) -> None:
        raise OSError(f"cannot reach {name}")

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", refuse)
    with pytest.raises(InputError, match=r"cannot reach facebook/dinov2-base.*weights\.repa=0"):
        make_repa(tiny, torch.device("cpu"))


def test_noise_cancelling_weights_leave_almost_no_noise_after_one_step() -> None:
    torch.manual_seed(0)
    built = SSDD(EncoderConfig(8, 4, 32, 4), replace(SIZES["XS"], groups=4), init="fan-in")
    noise, z = torch.randn(1, 3, 64, 64), torch.randn(1, 4, 8, 8)
    before = built.decode(z, steps=1, noise=noise)
    cancel_noise(built.decoder)
    after = built.decode(z, steps=1, noise=noise)
    share = [(image * noise).mean().abs().item() for image in (before, after)]
    assert share[1] < 0.5 * share[0]


def test_latent_noise_is_uniform_in_its_deviation_up_to_the_most_and_none_by_default() -> None:
    z = 3 * normal(torch.arange(400), (4, 8, 8), device="cpu") + 1
    added = noised(z, normal(torch.arange(400) + 1000, (1 + z[0].numel(),), device="cpu"), 0.8) - z
    deviations = (added.flatten(1).std(1) / z.flatten(1).std(1)).sort().values
    assert deviations.numpy() == pytest.approx(np.linspace(0, 0.8, 400), abs=0.06)  # quantiles of a uniform
    assert added.mean().item() == pytest.approx(0, abs=0.02)
    assert SSDDTraining().weights.latent_noise == KLVAETraining().latent_noise == 0


def test_a_decoder_under_training_sees_noised_latents_when_asked(tiny: SSDD) -> None:
    real, seeds = torch.rand(2, 3, 32, 32) * 2 - 1, [torch.arange(2) + stream for stream in range(4)]
    found = []
    for most in (0.0, 0.5):
        config = SSDDTraining(weights=LossWeights(perceptual=0, repa=0, latent_noise=most))
        found.append(Losses(config, tiny, torch.device("cpu")).denoise(real, seeds, 1)[0])
    assert found[0]["flow"] != found[1]["flow"]
    assert found[0]["kl"] == found[1]["kl"]
