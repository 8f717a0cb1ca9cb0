"""Latents as a generator's training data: which, in what order, with which statistics."""

from pathlib import Path

import pytest
import torch

from tests.generation.test_generation import CPU
from tokbench.errors import InputError
from tokbench.generation.compatibility import latent_space
from tokbench.generation.latents import Images, LatentConfig, Latents, encode
from tokbench.registry import create
from tokbench.runtime.processes import Processes


def encoded(labelled: Path, folder: Path, config: LatentConfig, *, ranks: int = 1) -> Latents:
    images = Images(str(labelled), config, seed=0)
    for rank in range(ranks):
        encode(create("identity"), "identity", images, folder, seed=0, processes=Processes(rank, ranks), device=CPU)
    return Latents(folder)


def test_latents_are_of_the_crops_and_of_their_mirror_images_with_ids_and_labels(
    labelled: Path, tmp_path: Path
) -> None:
    latents = encoded(labelled, tmp_path, LatentConfig(resolution=16, batch_size=5))
    assert len(latents) == 24
    assert latents.shape == (3, 16, 16)
    rows, labels = latents.rows([0, 1, 23])
    assert torch.equal(rows[0].flip(2), rows[1])
    assert labels.tolist() == [0, 0, 1]
    assert latents.ids()[:3] == ["class0/i0", "class0/i0", "class0/i1"]


def test_any_number_of_processes_and_an_interruption_make_the_same_shards(
    labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokbench.generation.latents.SHARD", 5)
    config = LatentConfig(resolution=16, batch_size=2)
    encoded(labelled, tmp_path / "one", config)
    encoded(labelled, tmp_path / "two", config, ranks=2)
    (tmp_path / "one" / "latents-000001.safetensors").unlink()
    encoded(labelled, tmp_path / "one", config)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files[:3] == [f"latents-00000{k}.safetensors" for k in range(3)]
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_statistics_are_those_of_all_rows_and_normalising_is_undone(labelled: Path, tmp_path: Path) -> None:
    latents = encoded(labelled, tmp_path, LatentConfig(resolution=16))
    rows, _ = latents.rows(range(24))
    per_channel, scalar = latents.statistics("channel"), latents.statistics("scalar")
    assert per_channel.std == pytest.approx(rows.double().std((0, 2, 3), correction=0).tolist(), rel=1e-9)
    assert scalar.mean == pytest.approx([rows.double().mean().item()])
    normal = scalar(rows)
    assert normal.mean().item() == pytest.approx(0, abs=1e-4)
    assert normal.std(correction=0).item() == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(per_channel.undo(per_channel(rows)), rows)


def test_latents_of_something_else_in_the_folder_are_refused_with_both_values(labelled: Path, tmp_path: Path) -> None:
    encoded(labelled, tmp_path, LatentConfig(resolution=16))
    with pytest.raises(InputError, match="resolution 16, asked is 8"):
        encoded(labelled, tmp_path, LatentConfig(resolution=8))


def test_unlabelled_images_are_one_class_and_random_crops_are_numbered(labelled: Path) -> None:
    images = Images(str(labelled / "class0"), LatentConfig(resolution=8, crops=3), seed=0)
    assert images.classes == ["all"]
    first = list(images.stream(range(images.num_images)))
    assert len({sample for sample, _, _ in first}) == 18
    assert all(torch.equal(a[2], b[2]) for a, b in zip(first[4:6], images.stream([4, 5]), strict=True))


def test_latents_of_any_memory_format_are_kept(labelled: Path, tmp_path: Path) -> None:
    images = Images(str(labelled), LatentConfig(resolution=16), seed=0)
    encode(create("pca-f8c4"), "pca-f8c4", images, tmp_path, seed=0, processes=Processes(), device=CPU)
    assert Latents(tmp_path).shape == (4, 2, 2)


def test_a_tokenizer_without_a_grid_of_latents_is_refused() -> None:
    with pytest.raises(InputError, match="a DiT needs continuous latents"):
        latent_space(create("jpeg-q50"), 32, CPU)
