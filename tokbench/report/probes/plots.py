"""The curves that probes measure: one line a tokenizer."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from tokbench.metrics.conditions import OCTAVES, ROUND_TRIPS, SIGMAS, TEXT_HEIGHTS, at
from tokbench.report.columns import ResultEntry, metric_column, number
from tokbench.report.leaderboard import UNRANKED_FAMILIES
from tokbench.report.plots import axis_label, curves


def probe_plots(entries: Sequence[ResultEntry], folder: Path, place: str) -> list[Path | None]:
    """Figures of one set of images, where there is something to show; `place` ends their names."""
    entries = [entry for entry in entries if entry.result.tokenizer.family not in UNRANKED_FAMILIES]
    draw, made = partial(curves, legend=True), []
    for metric in ("lpips-alex", "mind-mobilenet"):
        lines = _lines(entries, {sigma: at(metric, sigma) if sigma else metric for sigma in SIGMAS})
        path = folder / f"robustness-{metric}-{place}"
        made.append(draw(lines, "noise on the latents (their deviations)", _label(metric), path, log=False))
    for metric in ("psnr", "lpips-alex"):
        lines = _lines(entries, {trip: at(metric, f"x{trip}") if trip > 1 else metric for trip in ROUND_TRIPS})
        made.append(draw(lines, "round trips", _label(metric), folder / f"drift-{metric}-{place}"))
    for part in ("luma", "chroma"):
        lines = _lines(entries, {octave: at(f"error-{part}", f"{octave}px") for octave in OCTAVES})
        label = f"error by image, {part} (dB) ←"
        made.append(draw(lines, "wavelength from (px)", label, folder / f"spectrum-{part}-{place}"))
    lines = _lines(entries, {height: at("reread", f"{height}px") for height in TEXT_HEIGHTS})
    originals = _lines(entries, {height: at("read", f"{height}px") for height in TEXT_HEIGHTS})
    lines |= dict.fromkeys(["original"] if originals else [], next(iter(originals.values()), []))
    made.append(draw(lines, "font size (px)", "characters read →", folder / f"legibility-{place}", log=False))
    return made


def _label(metric: str) -> str:
    return axis_label(metric_column(metric))


def _lines(entries: Sequence[ResultEntry], names: Mapping[float, str]) -> dict[str, list[tuple[float, float]]]:
    """By tokenizer, metrics by the places that they are drawn at; without those that lack one."""
    lines = {}
    for entry in entries:
        values = {place: number(entry.result, name) for place, name in names.items()}
        known = [(place, value) for place, value in values.items() if value is not None]
        if len(known) == len(names):
            lines[entry.name] = known
    return lines
