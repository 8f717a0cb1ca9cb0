"""The card of a latent space on a tiny tokenizer: records, what is decoded between latents, caching and limits."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.conftest import TINY, Ran
from tests.forked import start
from tests.metrics.test_metrics import Stored
from tests.report.test_report import entry
from tokbench.latents.card import OF_LATENTS, vectors
from tokbench.latents.pairs import neighbours, slerp
from tokbench.metrics import GRID, METRICS
from tokbench.records.files import read_groups
from tokbench.records.result import Value, read_result
from tokbench.report.columns import ResultEntry
from tokbench.report.curves import against_arena, latent_spectra
from tokbench.report.reported import Reported

Call = Callable[..., Ran]
GRID_ONLY = ("latent-rank", "latent-sec", "latent-high", "latent-slope", "latent-cds", "latent-kurtosis")


@pytest.fixture
def classes(photographs: Path, tmp_path: Path) -> Path:
    """Three classes of two photographs, and a copy of each."""
    for i, path in enumerate(sorted(photographs.glob("*.png"))[:6]):
        folder = tmp_path / "classes" / f"n{i % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        for copy in "ab":
            (folder / f"{path.stem}-{copy}.png").write_bytes(path.read_bytes())
    return tmp_path / "classes"


def test_a_card_is_a_record_and_is_answered_from_it(classes: Path, tmp_path: Path, tokbench: Call) -> None:
    asked = ("latents", "--models", f"t={TINY},b=bicubic-f8", "--data", classes, "--res", 32, "--out", tmp_path)
    ran = tokbench(*asked, "--metrics", ",".join((*OF_LATENTS, "ifd-val-mobilenet")))
    assert ran.status == 0, ran.err
    assert "latent-rank ↑" in ran.out
    assert "scaling_factor" in ran.err
    folder = tmp_path / "latents" / "adm" / "classes-32"
    result = read_result(folder / "t.json")
    assert result.latents["shape"] == [4, 8, 8]
    assert all(result.metrics[name].value is not None for name in GRID_ONLY)
    assert result.metrics["latent-lnc"].value is not None
    assert "images of a class" in result.metrics["latent-viv"].note
    assert "2,048" in result.metrics["ifd-val-mobilenet"].note
    assert len(result.latents["correlation"]) == 4
    assert not list(folder.glob("*.features"))
    assert (folder / "spectra.png").exists()
    before = (folder / "t.json").read_bytes()
    assert tokbench(*asked, "--metrics", "latent-rank").status == 0
    assert (folder / "t.json").read_bytes() == before
    assert tokbench("report", "--results", tmp_path / "latents", "--columns", "latent-rank,latent-sec").status == 0
    page = ("--results", tmp_path / "latents", "--format", "html", "--out", tmp_path / "page")
    assert tokbench("report", *page).status == 0
    assert "spectra, classes" in (tmp_path / "page" / "index.html").read_text()
    compared = tokbench("compare", folder / "t.json", folder / "b.json")
    assert "latent-sec" in compared.out
    assert set(read_groups(folder / "t.per_image.csv.gz")["class"]) == {"n0", "n1", "n2"}


def test_scale_and_shift_make_the_latents_standard(photographs: Path, tmp_path: Path, tokbench: Call) -> None:
    asked = ("--data", photographs, "--res", 32, "--out", tmp_path, "--metrics", "latent-std", "--keep-features")
    assert tokbench("latents", "--models", f"t={TINY},same={TINY}", *asked).status == 0
    folder = tmp_path / "latents/adm/photographs-32"
    compared = tokbench("compare", folder / "t.json", folder / "same.json").out  # by the features that both kept
    assert "inconclusive" not in compared
    assert "latent-rank" in compared
    card = read_result(folder / "t.json")
    mean, deviation = np.array(card.latents["latents_mean"]), np.array(card.latents["latents_std"])
    whole = np.sqrt((deviation**2).mean() + mean.var())
    assert card.latents["scaling_factor"] == pytest.approx(1 / whole)
    assert card.latents["shift_factor"] == pytest.approx(mean.mean())
    assert card.metrics["latent-std"].value == pytest.approx(whole, rel=1e-5)


def test_scale_and_shift_are_of_the_tokenizers_own_latents() -> None:
    raw = np.random.default_rng(0).standard_normal((40, 2, 4, 4)) * [[[3.0]], [[0.5]]] + 7
    shift, scale = torch.tensor([1.0, 2.0]).reshape(-1, 1, 1), torch.tensor([0.5, 4.0]).reshape(-1, 1, 1)
    travelling = ((torch.from_numpy(raw) - shift) * scale).float().numpy()
    columns = {name: [value] * 40 for name, value in zip(GRID, (2, 4, 8), strict=True)}
    stored = Stored(columns, {("fake", "latents"): travelling.reshape(40, -1)})
    card = vectors(stored, SimpleNamespace(shift=shift, scale=scale))  # type: ignore[arg-type]
    assert card["latents_mean"] == pytest.approx(raw.mean((0, 2, 3)), rel=1e-4)
    assert card["latents_std"] == pytest.approx(raw.std((0, 2, 3)), rel=1e-4)
    assert card["scaling_factor"] == pytest.approx(1 / raw.std(), rel=1e-4)
    assert card["shift_factor"] == pytest.approx(raw.mean(), rel=1e-4)


def test_what_is_decoded_between_copies_is_the_image_itself(
    classes: Path, tmp_path: Path, tokbench: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each photograph's nearest latent is its copy's: with one candidate, iFID is rFID."""
    from tokbench.latents import pairs

    monkeypatch.setattr(pairs, "CANDIDATES", 1)
    for name in ("imind-val-mobilenet", "mind-mobilenet"):
        monkeypatch.setitem(METRICS, name, replace(METRICS[name], minimum=2))
    asked = ("--models", f"t={TINY}", "--data", classes, "--res", 32, "--out", tmp_path)
    assert tokbench("latents", *asked, "--metrics", "imind-val-mobilenet").status == 0
    assert tokbench("run", *asked, "--metrics", "mind-mobilenet").status == 0
    between = read_result(tmp_path / "latents/adm/classes-32/t.json").metrics["imind-val-mobilenet"].value
    itself = read_result(tmp_path / "adm/classes-32/t.json").metrics["mind-mobilenet"].value
    assert between == pytest.approx(itself, rel=1e-3)


def test_two_processes_make_the_card_of_one(photographs: Path, tmp_path: Path, tokbench: Call) -> None:
    asked = ["--models", f"t={TINY}", "--data", str(photographs), "--res", "32"]
    asked += ["--metrics", "latent-rank,latent-lds,imind-val-mobilenet", "--out"]
    ended = [process.finish() for process in start(["latents", *asked, str(tmp_path / "two")], tmp_path, 2)]
    assert [status for status, _ in ended] == [0, 0], ended
    assert tokbench("latents", *asked, tmp_path / "one").status == 0
    one, two = (read_result(tmp_path / name / "latents/adm/photographs-32/t.json") for name in ("one", "two"))
    assert (two.provenance.world_size, two.latents, two.metrics) == (2, one.latents, one.metrics)
    assert "positions within 32 px" in one.metrics["latent-lds"].note


@pytest.mark.parametrize(
    ("arguments", "status", "reason"),
    [
        (("--metrics", "psnr"), 2, "choose from latent-mean"),
        (("--res", "native"), 2, "compared at one size"),
        (("--models", f"odd={TINY}@multiple=5"), 2, "failed: odd: odd: needs sizes divisible by 5"),
        (("--models", f"c={TINY}@codes=true"), 1, "failed: c: has no continuous latents"),
    ],
)
def test_what_has_no_card_is_one_line(
    arguments: tuple[str, ...], status: int, reason: str, photographs: Path, tmp_path: Path, tokbench: Call
) -> None:
    ran = tokbench(
        "latents", "--models", f"t={TINY}", "--data", photographs, "--res", 32, "--out", tmp_path, *arguments
    )
    assert ran.status == status
    assert reason in ran.err


def test_run_refuses_what_is_not_measured_on_reconstructions(tokbench: Call) -> None:
    ran = tokbench("run", "--models", "identity", "--metrics", "ifid-val")
    assert ran.status == 2
    assert "tokbench latents" in ran.err


def test_neighbours_are_the_nearest_by_cosine_and_the_same_for_any_share() -> None:
    z = np.random.default_rng(0).standard_normal((60, 24)).astype(np.float32)
    chosen = neighbours(z, range(60), torch.device("cpu"))
    assert (chosen != np.arange(60)).all()
    cosine = (z / np.linalg.norm(z, axis=1, keepdims=True)) @ (z / np.linalg.norm(z, axis=1, keepdims=True)).T
    np.fill_diagonal(cosine, -2)
    assert all(place in row for place, row in zip(chosen, np.argsort(-cosine, axis=1)[:, :10], strict=True))
    np.testing.assert_array_equal(neighbours(z, range(1, 60, 7), torch.device("cpu")), chosen[1:60:7])


def test_halfway_on_the_sphere() -> None:
    a, b = torch.eye(3)[:2, None]
    torch.testing.assert_close(slerp(a, b), (a + b) / 2**0.5)
    torch.testing.assert_close(slerp(a, a), a)
    torch.testing.assert_close(slerp(a, 2 * a), 1.5 * a)


def test_spectra_and_the_arena_are_drawn_of_records_that_have_them(tmp_path: Path) -> None:
    first, second = (entry(tmp_path, name) for name in ("sd-vae-ft-mse", "mine"))
    assert latent_spectra([first], tmp_path / "none.png") is None
    card = {"frequency": [0.25, 0.5, 0.75], "power": [2.0, 1.0, 0.5]}
    made = [
        ResultEntry(replace(e.result, latents=card, metrics={"latent-sec": Value(0.2 + i / 10)}), e.path)
        for i, e in enumerate((first, second))
    ]
    assert latent_spectra(made, tmp_path / "spectra.png")
    numbers = dict.fromkeys(("resolution", "num_images", "rfid", "psnr", "ssim", "lpips"), None) | {"gfid": 25.9}
    row = Reported(
        model="SD-VAE + SiT-XL", tokenizer="sd-vae-ft-mse", dataset="ImageNet-1k gen", numbers=numbers, lpips_net="",
        source="VAE Arena", notes="",
    )  # fmt: skip
    assert against_arena(made, [row], tmp_path / "arena.png")
    assert against_arena(made, [replace(row, source="another")], tmp_path / "no.png") is None
    assert json.loads((made[0].path or tmp_path).read_text())["metrics"]
