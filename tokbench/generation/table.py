"""The table of `tokbench generate`."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from tokbench.errors import InputError
from tokbench.metrics import METRICS
from tokbench.records.files import read_results
from tokbench.records.result import EvalResult
from tokbench.report.columns import DAGGER, is_training_loss
from tokbench.runtime.terminal import stdout_console

BEST_BY = ("gfid", "fd-dinov2", "fd-mobilenet", "kid")  # the first that was measured marks the best of a sweep
ALWAYS = ("gfid", "is", "precision", "recall")
RATES = "/s: images a second of one process"


def print_table(results: Sequence[EvalResult], folders: Sequence[Path]) -> None:
    """tokenizer, rfid (looked up in `folders`), generator, steps trained, guidance, scores, and images a second of the
    generator, of the decoder and of both. To stdout; what could not be given is explained below it."""
    from rich.table import Table

    known = reconstruction_scores(folders)
    measured = {name for r in results for name, value in r.metrics.items() if value.value is not None}
    names = [name for name in METRICS if name in measured or name in ALWAYS]
    table = Table(caption=caption(results, names), caption_justify="left")
    for heading in (
        "tokenizer",
        "rfid",
        "generator",
        "steps trained",
        "guidance",
        *names,
        "generator/s",
        "decoder/s",
        "both/s",
    ):
        table.add_column(heading, justify="left" if heading in ("tokenizer", "generator") else "right")
    for result in results:
        run, seconds = result.settings.generation, result.provenance.seconds
        rfid = known.get((result.tokenizer.weights or result.tokenizer.name, result.dataset.resolution))
        steps = run["generator"]["steps_trained"]
        times = (seconds["generator"], seconds["decode"], seconds["generator"] + seconds["decode"])
        table.add_row(
            result.tokenizer.name,
            "-" if rfid is None else f"{rfid:.2f}",
            run["generator"]["name"],
            "-" if steps is None else f"{steps:,}",
            f"{run['guidance']:g}{'*' if is_best(result, results) else ''}",
            *(shown(result, name) for name in names),
            *(f"{1 / time:.2f}" for time in times),
        )
    stdout_console(200).print(table)
    notes = {v.note for r in results for v in r.metrics.values() if v.value is None}
    for note in sorted(notes | {reason for r in results for reason in r.unavailable.values()}):
        print(f"- {note}")


def caption(results: Sequence[EvalResult], names: Sequence[str]) -> str:
    """How many images against which reference, and what the marks mean that occur."""
    values = [result.metrics[name] for result in results for name in names if name in result.metrics]
    data = {f"N = {r.dataset.num_images:,} against {r.dataset.name}" for r in results}
    marks = {
        "± standard error": any(value.stderr is not None for value in values),
        "* best guidance scale": any(is_best(result, results) for result in results),
        DAGGER: any(is_training_loss(result, name) for result in results for name in names),
    }
    return "; ".join([*sorted(data), *(text for text, there in marks.items() if there), RATES])


def shown(result: EvalResult, name: str) -> str:
    """A metric's value with its † and its standard error, or a dash."""
    value, digits = result.metrics.get(name), METRICS[name].digits
    if value is None or value.value is None:
        return "-"
    error = "" if value.stderr is None else f" ±{value.stderr:.{digits}f}"
    return f"{value.value:.{digits}f}{'†' if is_training_loss(result, name) else ''}{error}"


def is_best(result: EvalResult, results: Sequence[EvalResult]) -> bool:
    """Whether of its tokenizer's results this has the lowest distance; nothing is marked without a sweep."""
    rivals = [r.metrics for r in results if r.tokenizer.name == result.tokenizer.name]
    for name in BEST_BY:
        values = [m[name].value if name in m else None for m in rivals]
        numbers = [value for value in values if value is not None]
        if len(rivals) > 1 and len(numbers) == len(values):
            return result.metrics[name].value == min(numbers)
    return False


def reconstruction_scores(folders: Sequence[Path]) -> dict[tuple[str, int], float]:
    """rfid by weights (name, for a model without) and resolution, from the results of `tokbench run`."""
    found: dict[tuple[str, int], float] = {}
    for folder in folders:
        with contextlib.suppress(InputError):
            for _, result in read_results(folder)[0]:
                value = result.metrics.get("rfid")
                if value is not None and value.value is not None:
                    found[result.tokenizer.weights or result.tokenizer.name, result.dataset.resolution] = value.value
    return found
