"""Scores of generated samples against a reference: records, error bars, statistics files, the table."""

import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.generation.test_generation import CPU, Brightness
from tokbench.errors import InputError
from tokbench.generation.score import (
    Reference,
    frechet_value,
    generation_metrics,
    open_reference,
    read_statistics,
    score,
)
from tokbench.metrics import frechet
from tokbench.records.samples import SampleStore
from tokbench.runtime.processes import Processes


def reference_of(text: Path, folder: Path, **extractors: Brightness) -> Reference:
    return open_reference(str(text), 16, extractors or {"inception": Brightness()}, folder, CPU, Processes())  # type: ignore[arg-type]


def test_scores_read_both_sides_of_different_number(labelled: Path, tmp_path: Path) -> None:
    reference = reference_of(labelled, tmp_path)
    assert reference.num_images == 12
    with SampleStore(tmp_path / "fake") as store:
        real = reference.features("inception")[[0, 1, 2, 3, 4, 5, 6, 7]]
        store.append([f"{i:08d}" for i in range(8)], {}, {("fake", "brightness"): real})
    values, unavailable = score(["gfid", "precision", "recall", "kid"], SampleStore(tmp_path / "fake"), reference, 6)
    assert values["precision"].value == 1.0
    assert values["recall"].value is not None
    assert values["recall"].value <= 1
    assert values["precision"].n == 6
    assert values["gfid"].value is None
    assert "needs 2,048 images" in values["gfid"].note
    assert not unavailable
    assert values["precision"].low == pytest.approx(0.61, abs=0.01)  # Wilson's of 6 out of 6
    assert values["recall"].stderr is None  # of six images


def test_features_are_kept_by_weights_and_resize_and_by_the_code(
    labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, again, added, other, edited = Brightness(), Brightness(), Brightness("more"), Brightness("b"), Brightness()
    reference_of(labelled, tmp_path, inception=first)
    reference_of(labelled, tmp_path, inception=again, mobilenet=added)
    assert (first.seen, again.seen, added.seen) == (12, 0, 12)
    assert reference_of(labelled, tmp_path, inception=other).features("inception").shape == (12, 12)
    assert other.seen == 12
    monkeypatch.setattr("tokbench.records.provenance.source_hash", lambda modules: "other code")
    reference_of(labelled, tmp_path, inception=edited)
    assert edited.seen == 12


def test_the_error_of_a_distance_is_its_spread_over_fresh_fakes(tmp_path: Path) -> None:
    """Forty sets of fakes against one reference: the error estimated from each is about the spread of all."""
    real = frechet.Moments(0, np.zeros(4), np.eye(4))
    reference = Reference("r", "", 0, None, {"inception": real}, {})
    values = []
    for seed in range(40):
        fake = 0.3 + 1.2 * np.random.default_rng(seed).standard_normal((2048, 4))
        values.append(frechet_value(reference, fake.astype(np.float32), "inception"))
    spread = np.std([value.value for value in values])
    assert np.median([value.stderr for value in values]) == pytest.approx(spread, rel=0.35)


def test_adm_statistics_give_moments_and_images_and_what_needs_images_says_so(tmp_path: Path) -> None:
    np.savez(tmp_path / "ref.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    reference = reference_of(tmp_path / "ref.npz", tmp_path)
    assert reference.moments("inception").mean.shape == (2048,)
    with pytest.raises(LookupError, match="statistics only, no images"):
        reference.features("inception")
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((5, 16, 16, 3), np.uint8))
    reference = reference_of(tmp_path / "images.npz", tmp_path)
    assert reference.features("inception").shape == (5, 12)


def test_statistics_of_another_dimension_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "ref.npz", mu=np.zeros(512), sigma=np.eye(512))
    with pytest.raises(InputError, match=r"\(512,\).*2048 dimensions"):
        read_statistics(tmp_path / "ref.npz")
    np.savez(tmp_path / "other.npz", features=np.zeros(3))
    with pytest.raises(InputError, match="holds features; expected mu and sigma"):
        read_statistics(tmp_path / "other.npz")
    np.savez(tmp_path / "shape.npz", arr_0=np.zeros((2, 3, 8, 8), np.uint8))
    with pytest.raises(InputError, match=r"uint8 \(2, 3, 8, 8\), expected uint8 \[N, H, W, 3\]"):
        read_statistics(tmp_path / "shape.npz")


@pytest.mark.parametrize("name", ["mu", "sigma"])
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_statistics_that_are_not_finite_are_refused(tmp_path: Path, name: str, number: float) -> None:
    arrays = {"mu": np.zeros(2048), "sigma": np.eye(2048)}
    arrays[name].flat[7] = number
    np.savez(tmp_path / "ref.npz", **arrays)
    with pytest.raises(InputError, match=f"{name} holds NaN or infinity"):
        read_statistics(tmp_path / "ref.npz")


@pytest.mark.parametrize(
    ("sigma", "reason"),
    [
        (np.diag(np.append(np.ones(2047), -1.0)), "eigenvalue -1"),
        (np.tri(2048), "not symmetric"),
        (np.eye(2048) * 1j, "complex"),
        (np.zeros((2048, 2048)), "eigenvalue 0"),
    ],
)
def test_a_sigma_of_no_features_is_refused_and_never_a_perfect_score(
    tmp_path: Path, sigma: np.ndarray, reason: str
) -> None:
    np.savez(tmp_path / "ref.npz", mu=np.zeros(2048), sigma=sigma)
    with pytest.raises(InputError, match=rf"ref\.npz: .*{reason}"):
        read_statistics(tmp_path / "ref.npz")


def test_a_reference_without_images_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "ref.npz", arr_0=np.zeros((0, 8, 8, 3), np.uint8))
    with pytest.raises(InputError, match="arr_0 holds no images"):
        read_statistics(tmp_path / "ref.npz")


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_the_images_of_a_file_are_read_in_parts(tmp_path: Path, write: Callable[..., None]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (300, 64, 64, 3), dtype=np.uint8)
    write(tmp_path / "ref.npz", arr_0=pixels, mu=np.zeros(2048), sigma=np.eye(2048))
    _, images = read_statistics(tmp_path / "ref.npz")
    assert images is not None
    wanted = list(range(1, 300, 2))
    tracemalloc.start()
    for numbers, batch in images.batches(wanted):
        assert np.array_equal(batch.permute(0, 2, 3, 1).numpy(), pixels[numbers])
        assert numbers == [wanted.pop(0) for _ in numbers]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert not wanted
    assert peak < pixels.nbytes / 2


def test_a_damaged_file_of_images_is_named(tmp_path: Path) -> None:
    path = tmp_path / "ref.npz"
    np.savez(path, arr_0=np.ones((40, 16, 16, 3), np.uint8))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"ref.npz: images \d+ to \d+ of arr_0 cannot be read \(Bad CRC"):
        reference_of(path, tmp_path)


@pytest.mark.parametrize("name", ["mu", "arr_0"])
@pytest.mark.parametrize(
    ("old", "new"), [(b"}", b"("), (b"(", b"9"), (b"'shape': (", b"'shape': (99999999999999, "), (b"NUMPY", b"numpy")]
)
def test_a_header_of_no_array_is_one_line(
    tmp_path: Path, name: str, old: bytes, new: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokbench.generation.score.INCEPTION_DIM", 4)
    np.savez(tmp_path / "good.npz", mu=np.zeros(4), sigma=np.eye(4), arr_0=np.zeros((2, 8, 8, 3), np.uint8))
    path = tmp_path / "ref.npz"
    with zipfile.ZipFile(tmp_path / "good.npz") as good, zipfile.ZipFile(path, "w") as broken:
        for member in good.namelist():
            data = good.read(member)
            if member == f"{name}.npy":  # whose header keeps its length, as there are spaces behind it
                data = data.replace(old, new, 1).replace(b" " * (len(new) - len(old)) + b"\n", b"\n", 1)
            broken.writestr(member, data)
    with pytest.raises(InputError, match=r"ref\.npz: ") as refused:
        read_statistics(path)
    assert "\n" not in str(refused.value)


def test_metrics_of_reconstruction_are_no_metrics_of_generation() -> None:
    assert generation_metrics(["kid", "gfid"]) == ["gfid", "kid"]
    with pytest.raises(InputError, match="rfid: compares an image with its reconstruction"):
        generation_metrics(["rfid"])
