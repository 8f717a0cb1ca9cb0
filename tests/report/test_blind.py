"""Strengths against published ones and closed forms; pages that name nobody; votes that find their models again."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import Ran
from tests.made_records import record, rows, write
from tokbench.errors import InputError
from tokbench.evaluation.pictures import save_pairs
from tokbench.report.blind.votes import strengths

# Citations between Biometrika, Comm. Statist., JASA and JRSS-B (Stigler 1994), the example of R's BradleyTerry2.
CITED = np.array([[0, 730, 498, 221], [33, 0, 68, 17], [320, 813, 0, 142], [284, 276, 325, 0]], dtype=float)
MODELS = ("ssdd", "klvae", "taef2")


def test_strengths_and_errors_of_cited_journals_are_the_published_ones() -> None:
    found, covariance = strengths(CITED)
    relative = np.delete(np.eye(4), 0, axis=0) - np.eye(4)[0]
    assert relative @ found == pytest.approx([-2.94907, -0.47957, 0.26895], abs=1e-4)
    errors = np.sqrt(np.diag(relative @ covariance @ relative.T))
    assert errors == pytest.approx([0.10255, 0.06059, 0.07083], abs=1e-4)
    assert found.sum() == pytest.approx(0)


def test_two_models_have_the_log_of_the_odds() -> None:
    found, covariance = strengths(np.array([[0.0, 30.5], [9.5, 0.0]]))
    apart = np.array([1, -1])
    assert apart @ found == pytest.approx(np.log(30.5 / 9.5))
    assert apart @ covariance @ apart == pytest.approx(1 / 30.5 + 1 / 9.5)


@pytest.mark.parametrize("wins", [[[0, 5], [0, 0]], [[0, 1, 3], [1, 0, 2], [0, 0, 0]]])
def test_models_that_never_lost_need_more_votes(wins: list[list[float]]) -> None:
    with pytest.raises(InputError, match="need more votes"):
        strengths(np.array(wins, dtype=float))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Records of three models with four saved images each."""
    folder, real = tmp_path / "results", torch.randint(0, 255, (4, 3, 16, 16), dtype=torch.uint8)
    for i, name in enumerate(MODELS):
        path = write(folder, record(name, seed=i, n=4), rows(i, 4, i))
        save_pairs(path, {f"img{j}": (real[j], real[j] // (i + 2)) for j in range(4)})
    return folder


def test_a_page_names_nobody_shows_pairs_in_turns_and_its_votes_find_their_models(
    results: Path, tmp_path: Path, tokbench: Callable[..., Ran]
) -> None:
    ran = tokbench("report", "--results", results, "--blind", 12, "--out", tmp_path / "site")
    assert ran.status == 0, ran.err
    text = (tmp_path / "site" / "blind.html").read_text()
    files = [path.name for path in (tmp_path / "site" / "blind").iterdir()]
    assert not [name for name in MODELS if name in text or any(name in file for file in files)]
    assert all((tmp_path / "site" / place).exists() for place in re.findall(r"blind/\w+\.png", text))
    data = json.loads(re.search(r"const data = (.*);", text)[1])  # type: ignore[index]
    pairs = [frozenset(one["codes"]) for one in data["comparisons"]]
    assert sorted(map(pairs.count, set(pairs))) == [4, 4, 4]
    votes = [{"codes": one["codes"], "choice": choice, "sample": one["sample"]}
             for one, choice in zip(data["comparisons"], ("first", "second", "tie") * 4, strict=True)]  # fmt: skip
    for i, part in enumerate((votes[:5], votes[5:])):
        exported = {"format": data["format"], "salt": data["salt"], "votes": part}
        (tmp_path / f"votes{i}.json").write_text(json.dumps(exported))
    arguments = ("--votes", tmp_path / "votes0.json", "--votes", tmp_path / "votes1.json", "--columns", "psnr")
    shown = tokbench("report", "--results", results, *arguments, "--format", "markdown")
    assert "12 votes; strength" in shown.out
    assert all(f"| {name} |" in shown.out for name in MODELS)


@pytest.mark.parametrize(
    ("content", "said"),
    [("{}", "not a readable file of votes"), ('{"format": "tokbench-votes-1", "salt": "a", "votes": []}', "no votes"),
     ('{"format": "tokbench-votes-1", "salt": "a", "votes": [{"codes": ["x", "y"], "choice": "tie"}]}', "results lack"),
     ('{"format": "tokbench-votes-1", "salt": "a", "votes": [{"codes": ["x"], "choice": "tie"}]}', "no vote:")],
)  # fmt: skip
def test_votes_that_cannot_be_counted_are_named(
    content: str, said: str, results: Path, tmp_path: Path, tokbench: Callable[..., Ran]
) -> None:
    (tmp_path / "votes.json").write_text(content)
    ran = tokbench("report", "--results", results, "--votes", tmp_path / "votes.json")
    assert (ran.status, said in ran.reason, "votes.json" in ran.reason) == (2, True, True)


def test_a_page_needs_saved_images_of_two_models(tmp_path: Path, tokbench: Callable[..., Ran]) -> None:
    write(tmp_path, record("ssdd", n=4), rows(0, 4, 0))
    ran = tokbench("report", "--results", tmp_path, "--blind", 3, "--out", tmp_path / "site")
    assert (ran.status, "saved images of two models" in ran.reason) == (2, True)
    assert tokbench("report", "--results", tmp_path, "--blind", 3).status == 2
