"""Errors of colour against scikit-image and closed forms."""

import numpy as np
import pytest
import torch
from skimage.color import deltaE_ciede2000, rgb2hsv, rgb2lab
from torch import Tensor

from tests.metrics.test_metrics import noisy, photographs
from tokbench.metrics.pixel import COLOUR_COLUMNS, ciede2000, colour_errors, lab, saturation
from tokbench.metrics.suite import MetricSuite


def last(images: Tensor) -> np.ndarray:
    return images.permute(0, 2, 3, 1).numpy()


@pytest.fixture(params=["noise", "photographs"])
def pair(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor]:
    if request.param == "photographs":
        return photographs(64, 2), noisy(photographs(64, 2))
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randint(0, 256, (1, 3, 48, 48), generator=generator, dtype=torch.uint8) for _ in range(2))  # type: ignore[return-value]


def test_colours_and_their_differences_are_scikit_images(pair: tuple[Tensor, Tensor]) -> None:
    real, fake = pair
    expected = [rgb2lab(last(images)) for images in pair]
    for images, theirs in zip(pair, expected, strict=True):
        np.testing.assert_allclose(last(lab(images)), theirs, atol=2e-3)
        np.testing.assert_allclose(saturation(images).numpy(), rgb2hsv(last(images))[..., 1], atol=1e-5)
    found = ciede2000(lab(real), lab(fake)).numpy()
    np.testing.assert_allclose(found, deltaE_ciede2000(*expected), atol=5e-3)


def test_bias_is_signed_and_clipping_is_what_the_reconstruction_adds() -> None:
    real = torch.full((2, 3, 8, 8), 100, dtype=torch.uint8)
    real[0, 0, 0, 0] = 255
    fake = real.clone()
    fake[:, 0] -= 10
    fake[:, 2] += 4
    fake[1, 1, :2] = 0  # 16 of 192 values
    found = dict(
        zip(COLOUR_COLUMNS, (colour_errors(real, fake)[name].tolist() for name in COLOUR_COLUMNS), strict=True)
    )
    assert found["bias-red"] == [-10, -10]
    assert found["bias-green"] == [0, -25]
    assert found["bias-blue"] == [4, 4]
    assert found["clipped"] == pytest.approx([0, 16 / 192])
    assert found["bias-saturation"][0] > 0
    same = colour_errors(real, real)
    assert all(float(values.abs().max()) == 0 for values in same.values())


def test_all_colour_metrics_share_one_pass() -> None:
    suite = MetricSuite(COLOUR_COLUMNS, 2, 64)
    assert len(suite.scorers) == 1
    assert set(suite.score(photographs(64, 2), noisy(photographs(64, 2)))) == set(COLOUR_COLUMNS)
