"""The sweep's report from the records that run.py kept: tables, verdicts, figures, written beside the records.

python -m results.sweep.analyse results/sweep/cpu
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from results.study.analyse import arm_cell, difference, over_seeds, read, read_rows, text
from results.study.contrasts import Contrast, contrast, holm, verdict
from results.sweep.run import FAMILIES
from tokbench.records.files import write_whole
from tokbench.records.result import EvalResult
from tokbench.report.columns import is_training_loss, metric_column, number
from tokbench.report.plots import axis_label, curves
from tokbench.report.speed import read_speeds
from tokbench.report.tables import Heading, Table, TableCell, markdown, plain

PRIMARY = "lpips-alex"  # no decoder trains on it
LEAST_BITS = 1e-4  # a pixel: where a latent that says nothing stands on a log axis
Places = dict[str, dict[str, EvalResult]]  # resolution -> name -> result


def write(kept: Path) -> None:
    """REPORT.md and its figures into the folder of records."""
    write_whole(kept / "REPORT.md", report(kept, draw(kept)))
    print(kept / "REPORT.md")


def report(kept: Path, drawn: Sequence[Path]) -> str:
    """REPORT.md, all of it from the records, with the figures that were drawn."""
    places = read_places(kept)
    judged = verdicts(kept) if endpoint(places) == PRIMARY else {}  # --quick has no endpoint
    first = next(iter(places[main_place(places)].values()))
    seeds, side = seeds_of(places), main_place(places)
    figures = "\n".join(f"![{' against '.join(path.stem.rsplit('-', 1))}]({path.name})\n" for path in drawn)
    beside = "\n".join(f"## Beside codecs at {at} px\n\n{markdown(codecs_table(kept, places, at))}" for at in places)
    return f"""# The sweep over latents, preset `{kept.name}`

What was held equal, and what would count, is in the sweep's PLAN.md. {len(seeds)} training seeds,
{first.dataset.num_images} test photographs, one decode step, measured on {first.provenance.device},
{first.provenance.date[:10]}. Written by `python -m results.sweep.analyse` from the records beside this file.

## At {side} px

{markdown(latents_table(kept, places))}
† trained on this network. Small: crossed bootstrap over images and seeds, 95 %. Numbers: latent values per
pixel. Bits: entropy of the latents, rounded as coarsely as costs 0.1 dB of psnr, counted per channel; an estimate, no
file was written.

## Verdicts

{markdown(verdicts_table(kept, judged))}
{chr(10).join(f"- {latent}: {says(c, said)}" for latent, (c, _, said) in judged.items())}

{about_f16c4(places, judged)}
## Across resolutions

{markdown(resolutions_table(kept, places))}
Memory: of a decode of one image; on a CPU by how much the process grows at most, 0 where it fits into what was there.

{beside}
{figures}"""


def read_places(kept: Path) -> Places:
    """Results by resolution, the smallest first."""
    folders = {folder.name.rpartition("-")[2]: folder for folder in kept.glob("eval/*/*")}
    return {name: read(folders[name]) for name in sorted(folders, key=int)}


def main_place(places: Places) -> str:
    """The resolution that tables and verdicts are about."""
    return "256" if "256" in places else next(iter(places))


def rows_at(kept: Path, side: str) -> Mapping[str, Mapping[str, np.ndarray]]:
    return read_rows(next(kept.glob(f"eval/*/*-{side}")))


def seeds_of(places: Places) -> list[int]:
    names = places[main_place(places)]
    return sorted({int(name.rpartition("-")[2]) for name in names if name.startswith("conv-")})


def latents_of(places: Places) -> list[str]:
    """Those with both decoders, by how many numbers they spend on a pixel, most first."""
    found = {name.split("-")[1]: r for name, r in places[main_place(places)].items() if name.split("-")[0] in FAMILIES}
    return sorted(found, key=lambda latent: (-numbers_per_pixel(found[latent]), latent))


def numbers_per_pixel(result: EvalResult) -> float:
    assert result.tokenizer.channels is not None
    assert result.tokenizer.downsample is not None
    return result.tokenizer.channels / result.tokenizer.downsample**2


def measured(kept: Path, name: str) -> dict[str, dict[str, float]]:
    """What measure.py found of a model, by side: `bits_per_pixel` of the entropy-coded latents, `decode_bytes`."""
    found: dict[str, dict[str, float]] = json.loads((kept / "latents" / f"{name}.json").read_text())
    return found


def rate(kept: Path, name: str, side: str) -> float:
    return measured(kept, name)["bits_per_pixel"][side]


def shown(places: Places) -> list[str]:
    """The metrics that were measured, the endpoint first where it is one of them."""
    first = next(iter(places[main_place(places)].values())).metrics
    found = [name for name, value in first.items() if value.value is not None and name != "bpp"]
    return sorted(found, key=lambda name: name != endpoint(places))


def endpoint(places: Places) -> str:
    first = next(iter(places[main_place(places)].values()))
    return PRIMARY if PRIMARY in first.metrics else next(iter(first.metrics))


def latents_table(kept: Path, places: Places) -> Table:
    """What each decoder of each latent reaches, and what it took."""
    side, seeds, metrics = main_place(places), seeds_of(places), shown(places)
    rows, generator, lines = rows_at(kept, side), np.random.default_rng(0), []
    for latent in latents_of(places):
        for decoder in FAMILIES:
            arm = f"{decoder}-{latent}"
            result = places[side][f"{arm}-{seeds[0]}"]
            parts = [f"{latent}/{decoder}-{seeds[0]}{part}" for part in ("-start", "")]
            training = [json.loads((kept / "training" / f"{part}.json").read_text()) for part in parts]
            spent = [f"{sum(record[key] for record in training):,.0f}" for key in ("images_seen", "seconds")]
            size = f"{result.tokenizer.decoder_params / 1e6:.2f}"
            code = [f"{numbers_per_pixel(result):.4f}", f"{rate(kept, f'{arm}-{seeds[0]}', side):.3f}"]
            scores: list[str | TableCell] = [
                arm_cell(result, rows, arm, seeds, metric, generator) for metric in metrics
            ]
            lines.append([arm, *code, size, *spent, *scores])
    headings = [
        Heading(key="decoder"), Heading(key="numbers", unit="a pixel"), Heading(key="bits", unit="a pixel"),
        Heading(key="size", unit="M"), Heading(key="images"), Heading(key="training", unit="s"),
        *map(metric_column, metrics),
    ]  # fmt: skip
    return plain("", headings, lines)


def verdicts(kept: Path) -> dict[str, tuple[Contrast, float, str]]:
    """For each latent SSDD's decoder - the convolutional one on the endpoint, its Holm-corrected p, and the verdict."""
    places = read_places(kept)
    rows, seeds, latents = rows_at(kept, main_place(places)), seeds_of(places), latents_of(places)
    found = [contrast(rows, seeds, f"ssdd-{latent}", f"conv-{latent}", endpoint(places)) for latent in latents]
    corrected = holm([c.p for c in found])
    return {latent: (c, p, verdict(c, p)) for latent, c, p in zip(latents, found, corrected, strict=True)}


def verdicts_table(kept: Path, judged: Mapping[str, tuple[Contrast, float, str]]) -> Table:
    places = read_places(kept)
    rows, seeds = rows_at(kept, main_place(places)), seeds_of(places)
    lines: list[list[str | TableCell]] = []
    for c, p, said in judged.values():
        psnr = difference(contrast(rows, seeds, c.arm, c.base, "psnr"), 2)
        lines.append([f"{c.arm} - {c.base}", difference(c), f"{p:.4f}", c.signs, psnr, said])
    headings = [
        Heading(key="contrast"), Heading(key=f"Δ {endpoint(places)}"), Heading(key="p (Holm)"),
        Heading(key="by seed"), Heading(key="Δ psnr", unit="dB"), Heading(key="ssdd is", words=True),
    ]  # fmt: skip
    return plain("", headings, lines)


def says(c: Contrast, said: str) -> str:
    """A verdict in words."""
    if said == "not resolved":
        return f"**not resolved**: {c.mean:+.3f} {c.metric} is too little for this many photographs and seeds"
    return f"SSDD's decoder is **{said}** than the convolutional one by {abs(c.mean):.3f} {c.metric}, in every seed"


def about_f16c4(places: Places, judged: Mapping[str, tuple[Contrast, float, str]]) -> str:
    """One paragraph, from the records; nothing where the sweep has no f16c4 to compare."""
    latents, seeds, metric = latents_of(places), seeds_of(places), endpoint(places)
    if "f16c4" not in judged or len(latents) < 2:
        return ""
    results = places[main_place(places)]

    def means(latent: str) -> dict[str, tuple[float, float]]:
        arms = {d: f"{d}-{latent}" for d in FAMILIES}
        return {
            d: (over_seeds(results, a, seeds, metric), over_seeds(results, a, seeds, "psnr")) for d, a in arms.items()
        }

    own = means("f16c4")
    texts = [
        f"**f16c4** spends {numbers_per_pixel(results[f'conv-f16c4-{seeds[0]}']):.4f} numbers on a pixel and reaches "
        f"{own['conv'][0]:.3f} {metric} and {own['conv'][1]:.2f} dB with the convolutional decoder, "
        f"{own['ssdd'][0]:.3f} and {own['ssdd'][1]:.2f} dB with SSDD's."
    ]
    for other in (latent for latent in latents if latent != "f16c4"):
        loss = {d: own[d][0] - means(other)[d][0] for d in FAMILIES}
        dearer = "more" if abs(loss["ssdd"]) > abs(loss["conv"]) else "less"
        texts.append(
            f"Against {other} that is {loss['conv']:+.3f} {metric} for the convolutional decoder and "
            f"{loss['ssdd']:+.3f} for SSDD's, to which the step matters {dearer}."
        )
    gaps = {latent: c.mean for latent, (c, _, _) in judged.items()}
    largest = max(gaps, key=lambda latent: abs(gaps[latent]))
    texts.append(
        f"SSDD's difference to the convolutional decoder is {gaps['f16c4']:+.3f} here ({judged['f16c4'][2]}); "
        f"the largest of all is that at {largest} ({gaps[largest]:+.3f})."
    )
    return " ".join(texts) + "\n"


def resolutions_table(kept: Path, places: Places) -> Table:
    """The endpoint and psnr at every size, mean over seeds; time and memory of a decode of one image."""
    seeds, metric = seeds_of(places), endpoint(places)
    metrics = list(dict.fromkeys((metric, "psnr")))
    timed = timings(kept)
    sides = sorted({side for line in timed.values() for side in line})
    lines = []
    for latent in latents_of(places):
        for decoder in FAMILIES:
            arm = f"{decoder}-{latent}"
            scores = [text(over_seeds(results, arm, seeds, m), m) for m in metrics for results in places.values()]
            found = [timed.get(arm, {}).get(side) for side in sides]
            times = ["–" if f is None else f"{f[0]:.0f}" for f in found]
            grown = measured(kept, f"{arm}-{seeds[0]}")["decode_bytes"]
            used = [
                grown.get(str(side)) if f is None or f[1] is None else f[1]
                for side, f in zip(sides, found, strict=True)
            ]
            memory = ["–" if value is None else f"{value / 1e6:,.0f}" for value in used]
            lines.append([arm, *scores, *times, *memory])
    headings = [Heading(key="decoder")]
    headings += [Heading(key=f"{m} {side}", better=metric_column(m).better) for m in metrics for side in places]
    headings += [Heading(key=f"decode {side}", unit="ms/img", better="lower") for side in sides]
    headings += [Heading(key=f"memory {side}", unit="MB", better="lower") for side in sides]
    return plain("", headings, lines)


def timings(kept: Path) -> dict[str, dict[int, tuple[float, int | None]]]:
    """decoder-latent -> side -> (milliseconds an image, bytes) of a decode."""
    found: dict[str, dict[int, tuple[float, int | None]]] = {}
    for record in read_speeds(kept / "speed")[0]:
        if (decode := record.stages.get("decode")) is not None:
            line = found.setdefault(record.tokenizer.name.rpartition("-")[0], {})
            line[record.resolution] = (1000 / decode.images_per_second, decode.memory_allocated)
    return found


def codecs_table(kept: Path, places: Places, side: str) -> Table:
    """The decoders, means over seeds, among the ladders of qualities, by bits."""
    results, seeds, metrics = places[side], seeds_of(places), shown(places)
    found: list[tuple[float, str, list[TableCell]]] = []
    for name, result in results.items():
        if result.tokenizer.family == "codec":
            cells = [TableCell(text(number(result, metric), metric)) for metric in metrics]
            found.append((measured_rate(result), name, cells))
    for arm in (f"{decoder}-{latent}" for latent in latents_of(places) for decoder in FAMILIES):
        first = f"{arm}-{seeds[0]}"
        cells = [
            TableCell(text(over_seeds(results, arm, seeds, m), m), dagger=is_training_loss(results[first], m))
            for m in metrics
        ]
        found.append((rate(kept, first, side), arm, cells))
    lines = [[name, f"{bits:.3f}", *cells] for bits, name, cells in sorted(found, key=lambda row: row[:2])]
    return plain("", [Heading(key=""), Heading(key="bits", unit="a pixel"), *map(metric_column, metrics)], lines)


def measured_rate(result: EvalResult) -> float:
    return float(number(result, "bpp") or 0.0)


def lines_of(kept: Path) -> dict[str, tuple[str, str, dict[str, list[tuple[float, float]]]]]:
    """Figure -> (what is along, what is up, its lines)."""
    places = read_places(kept)
    side, seeds, latents = main_place(places), seeds_of(places), latents_of(places)
    results = places[side]
    found: dict[str, tuple[str, str, dict[str, list[tuple[float, float]]]]] = {}

    def over_latents(place: Callable[[str], float], metric: str) -> dict[str, list[tuple[float, float]]]:
        return {
            d: [
                (place(f"{d}-{latent}-{seeds[0]}"), over_seeds(results, f"{d}-{latent}", seeds, metric))
                for latent in latents
            ]
            for d in FAMILIES
        }

    for metric in dict.fromkeys((endpoint(places), "psnr")):
        up = axis_label(metric_column(metric))
        along = over_latents(lambda name: numbers_per_pixel(results[name]), metric)
        found[f"{metric}-numbers"] = ("numbers per pixel", up, along)
        codecs: dict[str, list[tuple[float, float]]] = {}
        for name, result in results.items():
            if result.tokenizer.family == "codec" and (value := number(result, metric)) is not None:
                codecs.setdefault(name.split("-")[0], []).append((measured_rate(result), value))
        coded = over_latents(lambda name: max(rate(kept, name, side), LEAST_BITS), metric)
        found[f"{metric}-bits"] = ("bits per pixel", up, codecs | coded)
        sides = {int(name): at for name, at in places.items()}
        arms = [f"{d}-{latent}" for latent in latents for d in FAMILIES]
        across = {arm: [(float(s), over_seeds(at, arm, seeds, metric)) for s, at in sides.items()] for arm in arms}
        found[f"{metric}-resolution"] = ("side (px)", up, across)
    times = {arm: [(float(s), value[0]) for s, value in line.items()] for arm, line in timings(kept).items()}
    found["time-resolution"] = ("side (px)", "decode (ms/img) ←", times)
    return {
        name: figure for name, figure in found.items() if len({x for line in figure[2].values() for x, _ in line}) > 1
    }


def draw(kept: Path) -> list[Path]:
    """The figures of the report, beside it; one that has nothing to show is left out."""
    paths = [
        curves(lines, along, up, kept / f"{name}.png", legend=True)
        for name, (along, up, lines) in lines_of(kept).items()
    ]
    return [path for path in paths if path is not None]


if __name__ == "__main__":
    write(Path(sys.argv[1]))
