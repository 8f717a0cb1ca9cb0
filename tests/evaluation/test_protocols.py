"""Laws of the protocol table and of the crops it names, against references written here independently."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as T

from tokbench.data.crops import crop
from tokbench.data.open import SAMPLES
from tokbench.errors import InputError
from tokbench.protocols import PROTOCOLS, Protocol, find_protocol

PHOTOS = sorted(SAMPLES.glob("*.jpg"))[::3]
ODD_SIZES = [(64, 64), (65, 64), (64, 200), (127, 129), (128, 128), (301, 133), (64, 97)]


def photo(size: tuple[int, int] | None = None, index: int = 0) -> Image.Image:
    image = Image.open(PHOTOS[index]).convert("RGB")
    return image if size is None else image.resize(size)


def adm_reference(image: Image.Image, size: int) -> np.ndarray:
    """guided-diffusion's formulation: halve by tuples, one scale for both sides, cut the array."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.Resampling.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.Resampling.BICUBIC)
    array = np.array(image)
    y, x = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[y : y + size, x : x + size]


def torchvision_reference(image: Image.Image, size: int, mode: T.InterpolationMode) -> np.ndarray:
    return np.array(T.Compose([T.Resize(size, interpolation=mode), T.CenterCrop(size)])(image))


@pytest.mark.parametrize("resolution", [128, 256])
def test_adm_crop_equals_its_reference_on_photographs(resolution: int) -> None:
    for index in range(len(PHOTOS)):
        image = photo(index=index)
        assert (crop(image, resolution, PROTOCOLS["adm"]) == adm_reference(image, resolution)).all()


@pytest.mark.parametrize("name", ["ssdd", "titok"])
@pytest.mark.parametrize("resolution", [128, 256])
def test_pil_crops_equal_torchvision_on_photographs(name: str, resolution: int) -> None:
    mode = {"ssdd": T.InterpolationMode.BILINEAR, "titok": T.InterpolationMode.BICUBIC}[name]
    for index in range(len(PHOTOS)):
        image = photo(index=index)
        assert (crop(image, resolution, PROTOCOLS[name]) == torchvision_reference(image, resolution, mode)).all()


def test_tensor_crop_equals_torchvision_on_photographs() -> None:
    reference = T.Compose([T.ToTensor(), T.Resize(128, antialias=True), T.CenterCrop(128)])
    for index in range(len(PHOTOS)):
        image = photo(index=index)
        pixels = torch.floor((reference(image) * 2 - 1).clamp(-1, 1) * 127.5 + 128).clamp(max=255)
        assert (crop(image, 128, PROTOCOLS["vavae"]) == pixels.permute(1, 2, 0).numpy()).all()


@pytest.mark.parametrize("size", ODD_SIZES)
def test_crops_equal_their_references_at_odd_sizes(size: tuple[int, int]) -> None:
    image = photo(size)
    assert (crop(image, 64, PROTOCOLS["adm"]) == adm_reference(image, 64)).all()
    assert (crop(image, 64, PROTOCOLS["ssdd"]) == torchvision_reference(image, 64, T.InterpolationMode.BILINEAR)).all()
    assert (crop(image, 64, PROTOCOLS["titok"]) == torchvision_reference(image, 64, T.InterpolationMode.BICUBIC)).all()


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=lambda protocol: protocol.name)
def test_every_protocol_enlarges_small_images_to_the_resolution(protocol: Protocol) -> None:
    assert crop(photo((40, 51)), 64, protocol).shape == (64, 64, 3)


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=lambda protocol: protocol.name)
def test_an_image_of_the_resolution_is_not_touched(protocol: Protocol) -> None:
    image = photo((64, 64))
    assert (crop(image, 64, protocol) == np.asarray(image)).all()


def test_fingerprint_changes_with_what_changes_numbers_and_not_with_texts() -> None:
    adm = PROTOCOLS["adm"]
    assert len({protocol.fingerprint() for protocol in PROTOCOLS.values()}) == len(PROTOCOLS)
    assert dataclasses.replace(adm, summary="x", notes=("y",)).fingerprint() == adm.fingerprint()
    for change in ({"version": 2}, {"crop": "pil-bilinear"}, {"posterior": "sample"}, {"fake_rounding": "truncate"}):
        assert dataclasses.replace(adm, **change).fingerprint() != adm.fingerprint()


def test_unknown_protocol_names_the_known() -> None:
    with pytest.raises(InputError, match="adm, ssdd"):
        find_protocol("imagenet")
