"""Probes: the one that is here, and one from outside."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import tokbench as tb
from tests.conftest import TINY, Ran
from tokbench import registry
from tokbench.data.open import open_source
from tokbench.evaluation.evaluate import evaluate
from tokbench.evaluation.probe import ROUND_TRIPS, drift, table_of
from tokbench.metrics.suite import MetricSuite
from tokbench.records.measurement import Measurement
from tokbench.records.result import Value

CPU = torch.device("cpu")
ASKED = Measurement(resolution=32, metrics=("psnr",), workers=0)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = property(lambda suite: {"lpips-alex": "its network is not here"})
    monkeypatch.setattr(MetricSuite, "unavailable", missing)


@pytest.mark.parametrize("model", ["identity", f"{TINY}@noise=0.3", "jpeg-q10", "bicubic-f8"])
def test_the_first_round_trip_is_what_run_measures_and_the_next_lose_more_unless_nothing_is_lost(
    model: str, photographs: Path
) -> None:
    tokenizer = registry.create(model)
    values = drift(tokenizer, open_source(photographs), ASKED, CPU)
    psnr = [values[f"psnr x{trip}"].value for trip in ROUND_TRIPS]
    measured = evaluate(tokenizer, photographs, 32, ["psnr"]).metrics["psnr"]
    assert psnr[0] == pytest.approx(measured.value, abs=1e-4)  # dB
    assert values["psnr x1"].stderr == pytest.approx(measured.stderr, abs=1e-4)
    assert psnr == [100] * 4 if model == "identity" else psnr[0] < 100
    assert psnr == sorted(psnr, reverse=True)
    assert values["lpips-alex"] == Value(None, note="its network is not here")


def brightness(
    tokenizer: object, source: tb.Source, measurement: Measurement, device: torch.device
) -> dict[str, Value]:
    return {"images": Value(float(len(source)), n=len(source)), "psnr at last": Value(12.345, 0.5)}


@pytest.fixture
def brightness_probe() -> Iterator[None]:
    tb.register_probe("brightness", brightness, summary="for tests")
    yield
    del registry.PROBES._known["brightness"]


@pytest.mark.usefixtures("brightness_probe")
def test_a_probe_from_outside_is_listed_run_on_every_model_and_printed(
    tokbench: Callable[..., Ran], photographs: Path
) -> None:
    assert "brightness" in (listed := tokbench("list", "probes").out)
    assert "drift" in listed
    command = ("--models", f"tiny={TINY},bad={TINY}@fault=load", "--data", photographs, "--res", 32)
    ran = tokbench("probe", "brightness", *command)
    assert ran.status == 1
    assert "failed: bad" in ran.err
    assert "the weights are gone" in ran.err
    assert "psnr at last" in ran.out
    assert "12.35" in ran.out  # digits of the metric
    assert "N = 12" in ran.out
    with pytest.raises(ValueError, match="taken already"):
        tb.register_probe("brightness", brightness, summary="again")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(("drif", "--models", "identity"), 'unknown probe "drif"; did you mean drift?'),
     (("drift", "--models", "identiti"), "did you mean identity"),
     (("drift", "--models", f"{TINY}@multiple=5"), "needs sizes divisible by 5"),
     (("drift", "--models", "identity", "--res", "64", "--small", "refuse"), "smaller than 64:")],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(
    arguments: tuple[str, ...], said: str, tokbench: Callable[..., Ran], photographs: Path
) -> None:
    ran = tokbench("probe", "--res", 32, *arguments, "--data", photographs)
    assert (ran.status, said in ran.reason) == (2, True)


def test_a_value_that_is_not_there_is_a_dash_and_its_reason_a_note() -> None:
    table = table_of("title", {"a": {"psnr x1": Value(1.0)}, "b": {"psnr x1": Value(None, note="too dark")}}, [])
    assert [row.cells["psnr x1"].text for row in table.rows] == ["1.00", "–"]
    assert table.notes == ["psnr x1: too dark"]
