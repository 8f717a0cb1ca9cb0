"""Statistics of latents against closed forms, scipy, and the slow way."""

import numpy as np
import pytest
from scipy.fft import dctn

from tests.metrics.test_metrics import Stored
from tokbench.metrics import GRID, METRICS, latents
from tokbench.metrics.latents import Latents

WHITE = np.random.default_rng(0).standard_normal((48, 4, 16, 16))


def held(z: np.ndarray, step: float = 16.0) -> Latents:
    return Latents(z.reshape(len(z), -1).astype(np.float32), z.shape[1], z.shape[2], step)


def sums(z: np.ndarray) -> latents.Sums:
    return latents.sums_of(held(z)).without(None)


def smooth(z: np.ndarray, times: int = 4) -> np.ndarray:
    for _ in range(times):
        z = (z + np.roll(z, 1, 2) + np.roll(z, 1, 3) + np.roll(z, 1, (2, 3))) / 4
    return z


def test_white_gaussian_latents_have_the_statistics_of_white_noise() -> None:
    whole = sums(WHITE)
    assert latents.effective_rank(whole) == pytest.approx(4, abs=0.01)
    assert latents.condition_number(whole) == pytest.approx(1, abs=0.1)
    assert latents.mean_correlation(whole) < 0.02
    assert np.abs(latents.kurtosis(whole)).max() < 0.15
    assert latents.slope(whole) == pytest.approx(0, abs=0.05)
    frequency = latents.radius(16, 16)
    assert latents.high_share(whole) == pytest.approx((frequency > 0.5).sum() / 255, abs=0.01)
    beyond = np.add.outer(np.arange(16), np.arange(16)) > 15
    assert latents.sec(whole) == pytest.approx(beyond.mean(), abs=0.01)
    for rows in (latents.lds, latents.cds):
        assert np.abs(rows(held(WHITE)).mean()) < 0.03


def test_channels_have_the_moments_that_numpy_finds() -> None:
    mixing = np.array([[2.0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0.1, 0], [0, 0, 0, 3]])
    z = np.einsum("cd,ndhw->nchw", mixing, WHITE**3) + 0.7
    whole, flat = sums(z), z.transpose(1, 0, 2, 3).reshape(4, -1)
    np.testing.assert_allclose(latents.mean(whole), flat.mean(1), rtol=1e-4)
    np.testing.assert_allclose(latents.covariance(whole), np.cov(flat, ddof=0), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(latents.correlations(whole), np.corrcoef(flat), rtol=1e-3, atol=1e-3)
    centred = flat - flat.mean(1, keepdims=True)
    np.testing.assert_allclose(latents.kurtosis(whole), (centred**4).mean(1) / flat.var(1) ** 2 - 3, rtol=1e-3)
    shares = np.linalg.eigvalsh(np.cov(flat))
    assert latents.condition_number(whole) == pytest.approx(shares[-1] / shares[0], rel=1e-3)
    shares /= shares.sum()
    assert latents.effective_rank(whole) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-4)


def test_a_channel_that_is_a_sum_of_others_has_no_condition_number() -> None:
    doubled = np.concatenate((WHITE, WHITE[:, :1]), axis=1)
    assert latents.effective_rank(sums(doubled)) < 4.01
    flat = Stored({name: [value] * 48 for name, value in zip(GRID, (5, 16, 16), strict=True)},
                  {("fake", "latents"): np.zeros((48, 5 * 256), np.float32)})  # fmt: skip
    value = METRICS["latent-condition"].value(flat).value
    assert value is not None
    assert np.isinf(value)


def test_the_cosine_transform_is_scipys() -> None:
    z = smooth(WHITE[:, :, :12])
    energy = (dctn(z, axes=(2, 3), norm="ortho") ** 2).sum((0, 1))
    np.testing.assert_allclose(sums(z).energy, energy, rtol=1e-3)


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_the_slope_is_that_of_the_power_law_that_was_put_in(power: float) -> None:
    frequency = latents.radius(32, 32).clip(min=1 / 32)
    basis = latents.cosines(32)
    drawn = np.random.default_rng(1).standard_normal((64, 2, 32, 32)) * frequency ** (-power / 2)
    assert latents.slope(sums(basis.T @ drawn @ basis)) == pytest.approx(-power, abs=0.1)


def slowly(z: np.ndarray, step: float) -> tuple[np.ndarray, np.ndarray]:
    """LDS and CDS pair by pair."""
    n, c, h, w = z.shape
    unit = (z - z.mean((2, 3), keepdims=True)).reshape(n, c, -1)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    cosine = np.einsum("nci,ncj->nij", unit, unit)
    places = np.stack(np.meshgrid(np.arange(h), np.arange(w), indexing="ij"), -1).reshape(-1, 2)
    distance = step * np.linalg.norm(places[:, None] - places[None], axis=2)
    near, far = (distance > 0) & (distance <= 32), distance >= 96
    rings = [k for k in range(1, 9) if (np.rint(distance / 16) == k).any()]
    means = [cosine[:, np.rint(distance / 16) == k].mean(1) for k in rings]
    return cosine[:, near].mean(1) - cosine[:, far].mean(1), -np.polyfit(rings, np.array(means), 1)[0]


@pytest.mark.parametrize("step", [8.0, 16.0, 32.0])
def test_similarities_of_positions_equal_those_of_all_pairs(step: float) -> None:
    z = smooth(WHITE[:5, :, :, :14])
    expected = slowly(z, step)
    np.testing.assert_allclose(latents.lds(held(z, step)), expected[0], atol=1e-5)
    np.testing.assert_allclose(latents.cds(held(z, step)), expected[1], atol=1e-5)


def test_a_grid_too_coarse_for_neighbours_gives_no_number() -> None:
    assert np.isnan(latents.lds(held(WHITE, 64.0))).all()


def test_neighbours_of_one_class_are_counted() -> None:
    labels = np.arange(40) % 2
    z = np.random.default_rng(2).standard_normal((40, 3, 4, 4)) + 30 * (labels - 0.5)[:, None, None, None]
    assert latents.lnc(held(z), labels).mean() == 1
    pooled = z.mean((2, 3)) - z.mean((0, 2, 3))
    pooled /= np.linalg.norm(pooled, axis=1, keepdims=True)
    cosine, mixed = pooled @ pooled.T, np.random.default_rng(3).integers(0, 3, 40)
    np.fill_diagonal(cosine, -2)
    nearest = np.argsort(-cosine, axis=1)[:, :10]
    np.testing.assert_allclose(latents.lnc(held(z), mixed), (mixed[nearest] == mixed[:, None]).mean(1))


def test_viv_is_that_of_the_covariance_that_was_put_in() -> None:
    generator = np.random.default_rng(4)
    by_channel, by_position = np.diag([1.0, 0.25]), np.diag([2.0, 1.0, 0.5, 0.5])
    drawn = np.sqrt(by_channel) @ generator.standard_normal((4000, 2, 4)) @ np.sqrt(by_position)
    expected = np.outer(np.diag(by_channel), np.diag(by_position)).ravel()
    centred = drawn - drawn.mean(0)
    np.testing.assert_allclose(np.sort(latents.separable_eigenvalues(centred)), np.sort(expected), rtol=0.06)
    # Two classes of one covariance, far apart: eq. 5 by the number of dimensions, of channels of deviation 1.
    z = np.concatenate((drawn, drawn + 5)).reshape(8000, 2, 2, 2)
    scale = sums(z)
    found = latents.viv(held(z), np.repeat([0, 1], 4000), latents.sums_of(held(z)))
    scaled = expected.reshape(2, 4) / latents.deviation(scale)[:, None] ** 2
    assert [value for value, _ in found] == pytest.approx([np.pi / 2 * np.sqrt(scaled).mean()] * 2, rel=0.02)
    assert found[0][1] == pytest.approx(scaled.mean(), rel=0.02)


def test_equation_5_is_the_integral_of_equation_4() -> None:
    t, variance = (np.arange(200_000) + 0.5) / 200_000, 0.3
    assert (variance / ((1 - t) ** 2 + t**2 * variance)).mean() == pytest.approx(np.pi / 2 * variance**0.5, rel=1e-4)


def test_classes_with_too_few_images_have_no_viv_and_it_says_how_many_it_needs() -> None:
    columns = {name: [value] * 48 for name, value in zip(GRID, (4, 16, 16), strict=True)}
    stored = Stored({**columns, "label": list(np.arange(48) % 2)}, {("fake", "latents"): held(WHITE).rows})
    value = METRICS["latent-viv"].value(stored)
    assert value.value is None
    assert value.note == "needs 66 images of a class"
    assert METRICS["latent-lnc"].value(stored).value == pytest.approx(0.5, abs=0.15)


def test_the_jackknife_gives_a_mean_its_standard_error() -> None:
    z = np.random.default_rng(5).standard_normal((16, 1, 1, 1))  # an image a group
    _, error = latents.jackknife(lambda s: float(latents.mean(s)[0]), latents.sums_of(held(z)))
    assert error == pytest.approx(z.std(ddof=1) / 4, rel=1e-5)


def test_one_image_and_two_have_values_without_errors() -> None:
    for num in (1, 2):
        value, error = latents.jackknife(latents.effective_rank, latents.sums_of(held(WHITE[:num])))
        assert 1 <= value <= 4
        assert error is None
