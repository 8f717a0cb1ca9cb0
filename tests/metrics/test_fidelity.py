"""torch-fidelity's `calculate_metrics` and ours on the same files, end to end; weights that nobody vouches for."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import TINY, Ran
from tokbench.config import override
from tokbench.generation.train import PRESETS, train
from tokbench.metrics import METRICS, RENAMED
from tokbench.records.result import EvalResult, read_result
from tokbench.registry import TrainOptions
from tokbench.weights import NETWORKS, file_sha256

Command = Callable[..., Ran]
NUM = 2300  # above the 2,048 that a Fréchet distance needs
OURS = {  # name in ours: name in theirs
    "rfid": "frechet_inception_distance", "gfid": "frechet_inception_distance",
    "kid": "kernel_inception_distance_mean", "is": "inception_score_mean", "precision": "precision", "recall": "recall",
}  # fmt: skip
LOOKED_UP = """
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tokbench import TokenizerInfo


class LookedUp:
    info = TokenizerInfo(name="looked-up", family="test")
    networks = {}

    def __init__(self, folder):
        self.fakes = {}
        for path in sorted((folder / "real").iterdir()):
            real, fake = (np.array(Image.open(one)) for one in (path, folder / "fake" / path.name))
            self.fakes[real.tobytes()] = torch.from_numpy(fake).permute(2, 0, 1) / 127.5 - 1

    def encode(self, images, *, sample, seeds):
        return images

    def decode(self, latents, *, seeds, size):
        return torch.stack([self.fakes[one.permute(1, 2, 0).numpy().tobytes()] for one in latents])


def load(folder: Path):
    return LookedUp(folder)
"""


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """What --weights changes in a process is undone."""
    tables: tuple[dict[str, Any], ...] = (METRICS, NETWORKS, RENAMED)
    kept = [dict(table) for table in tables]
    yield
    for table, before in zip(tables, kept, strict=True):
        table.clear()
        table.update(before)


def test_weights_of_unknown_hash_need_a_word_and_name_their_metrics(
    inception_file: Path, tokbench: Command, photographs: Path, tmp_path: Path
) -> None:
    command = ("run", "--models", f"tiny={TINY}", "--data", photographs, "--limit", 4, "--out", tmp_path, "--res", 32,
               "--metrics", "psnr,kid,rfid")  # fmt: skip
    ending = f"-unverified-{file_sha256(inception_file)[:8]}"
    for options, said in (
        (("--weights", inception_file), "--unverified takes it, under names as rfid-unverified-"),
        (("--unverified",), "which file?"),
        (("--weights", tmp_path / "none.pth", "--unverified"), "no such file"),
        (("--weights", inception_file, "--unverified", "--keep-features"), "--keep-features: not with --weights"),
    ):
        refused = tokbench(*command, *options)
        assert refused.status == 2
        assert said in refused.reason
    assert tokbench(*command, "--weights", inception_file, "--unverified").status == 0
    (path,) = tmp_path.glob("adm/*/*.json")
    found = read_result(path)
    assert set(found.metrics) == {"psnr", f"kid{ending}", f"rfid{ending}"}
    assert found.metrics[f"kid{ending}"].value is not None
    assert found.provenance.extractors == {f"inception{ending}": file_sha256(inception_file)}
    assert tokbench("report", "--results", tmp_path).status == 0
    assert tokbench("compare", path, path).status == 0


def remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each network looks at an image once: theirs, and ours, whose norms are folded. An hour becomes minutes."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    seen: dict[tuple[Any, bytes], tuple[torch.Tensor, ...]] = {}
    forward = FeatureExtractorInceptionV3.forward

    def once(self: Any, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        keys = [(tuple(self.features_list), image.numpy().tobytes()) for image in images]
        if new := [i for i, key in enumerate(keys) if key not in seen]:
            with torch.inference_mode():
                for i, *features in zip(new, *forward(self, images[new]), strict=True):
                    seen[keys[i]] = tuple(features)
        return tuple(torch.stack(parts) for parts in zip(*(seen[key] for key in keys), strict=True))

    monkeypatch.setattr(FeatureExtractorInceptionV3, "forward", once)


def exact_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch-fidelity's precision of float64 distances.

    Its own are float32, x² + y² - 2 xy: where features lie close together an image falls to a manifold's other side.
    """
    cdist = torch.cdist
    monkeypatch.setattr(torch, "cdist", lambda x, y: cdist(x.double(), y.double()))


def generate(tokbench: Command, folder: Path, reference: Path, metrics: str, *weights: Any) -> EvalResult:
    """The newest record of images drawn by a generator in `folder`, the same images every time."""
    status = tokbench(
        "generate", "--generator", folder / "dit", "--tokenizer", "identity", "--num-images", NUM, "--steps", 1,
        "--reference", reference, "--save", "png", "--out", folder / "generated", "--results", folder,
        "--metrics", metrics, *weights,
    ).status  # fmt: skip
    assert status == 0
    records = (folder / "generated").glob("generate-*/*/*.json")
    return read_result(max(records, key=lambda path: path.stat().st_mtime_ns))


def agrees(result: EvalResult, theirs: dict[str, float], *names: str) -> None:
    for name in names:
        (value,) = (value for key, value in result.metrics.items() if key.startswith(f"{name}-unverified"))
        assert value.value == pytest.approx(theirs[OURS[name]], rel=1e-5, abs=1e-5), name


@pytest.mark.fidelity
@pytest.mark.filterwarnings("ignore")
def test_run_score_and_generate_equal_torch_fidelity_on_the_same_files(
    inception_file: Path, tokbench: Command, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch_fidelity import calculate_metrics

    torch.set_num_threads(2)
    remembered(monkeypatch)
    exact_distances(monkeypatch)
    weights = ("--weights", inception_file, "--unverified", "--device", "cpu")
    real, fake = tmp_path / "real", tmp_path / "fake"
    settings = ["tokenizer=identity", "latents.resolution=32", "latents.crops=0", "patch=8", "run.steps=1",
                "run.batch_size=4", "run.sample_every=100", "run.dtype=float32", "run.device=cpu"]  # fmt: skip
    train(override(PRESETS["tiny"], settings), TrainOptions(str(labelled), tmp_path / "dit"))
    generate(tokbench, tmp_path, labelled, "is", *weights)
    (images,) = {path.parent for path in (tmp_path / "generated").rglob("00000000.png")}
    shutil.copytree(images, fake)
    shutil.copytree(images, real)
    rng = np.random.default_rng(0)
    for path in sorted(real.iterdir())[:300]:  # the rest they have in common: fewer passes of the networks
        Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((32, 32)).save(path)
    for number, path in enumerate(sorted(real.iterdir())):  # but under other names
        path.rename(real / f"next-{(number + 1) % NUM:08d}.png")
    for path in real.iterdir():
        path.rename(real / path.name.removeprefix("next-"))
    of_generate = generate(tokbench, tmp_path, real, "gfid,kid,is,precision,recall", *weights)
    theirs = calculate_metrics(
        input1=str(fake), input2=str(real), fid=True, isc=True, kid=True, prc=True, cuda=False, cache=False,
        samples_shuffle=False, feature_extractor="inception-v3-compat", feature_layer_prc="2048",  # whose own is VGG16
        feature_extractor_weights_path=str(inception_file), batch_size=50, verbose=False,
    )  # fmt: skip
    agrees(of_generate, theirs, "gfid", "kid", "is", "precision", "recall")
    both = ("--metrics", "rfid,kid,is,precision,recall", "--workers", 0, *weights)
    assert tokbench("score", real, fake, "--out", tmp_path / "scored", *both).status == 0
    (path,) = (tmp_path / "scored").glob("adm/*/*.json")
    agrees(read_result(path), theirs, "rfid", "kid", "is", "precision", "recall")
    (tmp_path / "model.py").write_text(LOOKED_UP)
    model = f"looked-up={tmp_path / 'model.py'}:load@folder={tmp_path}"
    command = ("run", "--models", model, "--data", real, "--res", 32, "--save-images", 0, "--out", tmp_path / "run")
    assert tokbench(*command, *both).status == 0
    (path,) = (tmp_path / "run").glob("adm/*/*.json")
    agrees(read_result(path), theirs, "rfid", "kid", "is", "precision", "recall")
