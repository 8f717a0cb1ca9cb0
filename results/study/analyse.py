"""Tables and figures of the study from the records that run.py kept. REPORT.md, written by hand, holds these tables.

python -m results.study.analyse results/study/cpu [runs/study/cpu]     (the second has the pictures)
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from results.study.contrasts import Contrast, Tables, conclusions, contrast, crossed_bootstrap, holm, values, verdict
from results.study.run import ARMS, FRONT, STEPS
from tokbench.metrics import METRICS
from tokbench.records.files import per_image_path, read_per_image
from tokbench.records.result import EvalResult, SpeedResult, read_result
from tokbench.report.columns import is_training_loss, metric_column, number
from tokbench.report.plots import Point, axis_label, curves, save, scatter
from tokbench.report.speed import read_speeds
from tokbench.report.tables import Heading, Table, TableCell, markdown, plain

TEST, DEVELOPMENT = Path("eval/adm/samples-256"), Path("eval/adm/development-256")
PRIMARY = "lpips-alex"  # endpoint
SHOWN = ("lpips-alex", "psnr", "ssim", "pd-mobilenet", "lpips-vgg")
CONTRASTS = (("c-student", "a"), ("c-student", "b"), ("c-student", "c-teacher"))
EXPLORATORY = (("c-student", "c-control"), ("b", "a"), ("d", "a"))
SUFFIXES = {steps: f"-steps{steps}" if steps > 1 else "" for steps in STEPS}
Results = dict[str, EvalResult]


def show(folder: Path, pictures: Path) -> None:
    """Print the tables as Markdown and what follows from them; draw the figures beside this file."""
    for table in tables(folder):
        print(markdown(table))
    for question, answer in answers(folder).items():
        print(f"- {question}: **{answer}**")
    here = Path(__file__).parent
    draw(folder, here, folder.name)
    strips(pictures / TEST, here / f"strips-{folder.name}.jpg", training_seeds(folder)[0])


def tables(folder: Path) -> list[Table]:
    """Everything that REPORT.md says in numbers of a preset's records."""
    results, rows, seeds = read(folder / TEST), read_rows(folder / TEST), training_seeds(folder)
    return [
        arms_table(results, rows, seeds, folder),
        contrasts_table(rows, seeds),
        steps_table(results, seeds),
        front_table(results, rows, seeds[0]),
        development_table(read(folder / DEVELOPMENT), seeds),
    ]


def read(folder: Path) -> Results:
    """Results by name."""
    return {path.stem: read_result(path) for path in sorted(folder.glob("*.json"))}


def read_rows(folder: Path) -> Tables:
    """Per-image columns by name; a stochastic decoder's are averaged over its noise seeds already."""
    found = {path.stem: read_per_image(per_image_path(path)) for path in sorted(folder.glob("*.json"))}
    assert len({tuple(ids) for ids, _ in found.values()}) == 1, "differences are paired by image"
    return {name: columns for name, (_, columns) in found.items()}


def training_seeds(folder: Path) -> list[int]:
    return sorted(int(path.stem.rpartition("-")[2]) for path in (folder / TEST).glob("a-*.json"))


def speeds(folder: Path) -> dict[str, SpeedResult]:
    """Speed records by name; (a)'s network is (d)'s too, c-student's that of all others in one step."""
    return {result.tokenizer.name: result for result in read_speeds(folder / "speed")[0]}


def timed_as(arm: str, seed: int) -> str:
    return f"{'a' if arm in ('a', 'd') else 'c-student'}-{seed}"


def over_seeds(results: Results, arm: str, seeds: Sequence[int], metric: str, suffix: str = "") -> float:
    """A metric's mean over training seeds."""
    found = [results[f"{arm}-{seed}{suffix}"].metrics[metric].value for seed in seeds]
    return float(np.mean([value for value in found if value is not None]))


def text(value: float | None, metric: str) -> str:
    return "–" if value is None else f"{value:.{METRICS[metric].digits}f}"


def difference(c: Contrast, digits: int = 4) -> TableCell:
    return TableCell(f"{c.mean:+.{digits}f}", f"[{c.low:+.{digits}f}, {c.high:+.{digits}f}]")


def arms_table(results: Results, rows: Tables, seeds: Sequence[int], folder: Path) -> Table:
    """Means over seeds with their intervals, and the cost of each arm; student and control include the teacher's."""
    generator = np.random.default_rng(0)
    lines: list[list[str | TableCell]] = []
    for arm in ARMS:
        result = results[f"{arm}-{seeds[0]}"]
        parts = ["c-teacher", arm] if arm in ("c-student", "c-control") else [arm]
        files = [folder / "training" / f"{part}-{seed}.json" for seed in seeds for part in parts]
        training = [json.loads(file.read_text()) for file in files]
        spent = [f"{sum(record[key] for record in training) / len(seeds):,.0f}" for key in ("images_seen", "seconds")]
        scores = [arm_cell(result, rows, arm, seeds, metric, generator) for metric in SHOWN]
        speed = speeds(folder)[timed_as(arm, seeds[0])]
        rate = f"{speed.stages['decode'].images_per_second:.2f}"
        size, cost = f"{result.tokenizer.decoder_params / 1e6:.2f}", f"{speed.flops['decode'] / 1e9:.1f}"
        lines.append([arm, size, *spent, *scores, cost, rate])
    headings = [
        Heading(key="arm"), Heading(key="decoder", unit="M"), Heading(key="images"), Heading(key="training", unit="s"),
        *map(metric_column, SHOWN), Heading(key="cost", unit="GFLOP"), Heading(key="decode", unit="img/s"),
    ]  # fmt: skip
    return plain("", headings, lines)


def arm_cell(
    result: EvalResult, rows: Tables, arm: str, seeds: Sequence[int], metric: str, generator: np.random.Generator
) -> TableCell:
    """Mean over images and seeds with the crossed bootstrap's 95 % interval."""
    matrix = values(rows, arm, seeds, metric)
    low, high = np.quantile(crossed_bootstrap(matrix, generator), [0.025, 0.975])
    interval = f"[{text(low, metric)}, {text(high, metric)}]"
    return TableCell(text(float(matrix.mean()), metric), interval, dagger=is_training_loss(result, metric))


def planned(rows: Tables, seeds: Sequence[int]) -> list[tuple[Contrast, float, str]]:
    """The planned contrasts on the endpoint with their Holm-corrected p and verdicts."""
    found = [contrast(rows, seeds, arm, base, PRIMARY) for arm, base in CONTRASTS]
    return [(c, p, verdict(c, p)) for c, p in zip(found, holm([c.p for c in found]), strict=True)]


def contrasts_table(rows: Tables, seeds: Sequence[int]) -> Table:
    """The three planned contrasts with Holm's correction and verdicts, then the exploratory ones."""
    judged = [(c, f"{p:.4f}", f"{c.arm} {said}") for c, p, said in planned(rows, seeds)]
    judged += [(contrast(rows, seeds, *pair, PRIMARY), "–", "exploratory") for pair in EXPLORATORY]
    lines = [
        [
            f"{c.arm} - {c.base}",
            difference(c),
            p,
            c.signs,
            difference(contrast(rows, seeds, c.arm, c.base, "psnr"), 2),
            said,
        ]
        for c, p, said in judged
    ]
    headings = [
        *(Heading(key=key) for key in ("contrast", f"Δ {PRIMARY}", "p (Holm)", "by seed")),
        Heading(key="Δ psnr", unit="dB"), Heading(key="verdict", words=True),
    ]  # fmt: skip
    return plain("", headings, lines)


def answers(folder: Path) -> dict[str, str]:
    """What follows by the plan."""
    rows, seeds = read_rows(folder / TEST), training_seeds(folder)
    verdicts = {c.base: said for c, _, said in planned(rows, seeds)}
    control = contrast(rows, seeds, "c-student", "c-control", PRIMARY)
    verdicts["c-control"] = verdict(control, control.p)
    return conclusions(verdicts, contrast(rows, seeds, "c-student", "a", "psnr"))


def steps_table(results: Results, seeds: Sequence[int]) -> Table:
    """The teacher over its steps."""
    lines = [
        [str(steps), *(text(over_seeds(results, "c-teacher", seeds, m, suffix), m) for m in (PRIMARY, "psnr"))]
        for steps, suffix in SUFFIXES.items()
    ]
    return plain("", [Heading(key="steps of c-teacher"), metric_column(PRIMARY), metric_column("psnr")], lines)


def front_table(results: Results, rows: Tables, seed: int) -> Table:
    """One seed of (a) and (c) on an encoder that SSDD trained, and on the KL-VAE's that all other arms have."""
    sides = {"SSDD's encoder": "front-", "KL-VAE's encoder": ""}
    pairs = [(name, metric) for name in sides for metric in (PRIMARY, "psnr")]
    lines: list[list[str | TableCell]] = [
        [arm, *(text(results[f"{sides[name]}{arm}-{seed}"].metrics[metric].value, metric) for name, metric in pairs)]
        for arm in FRONT
    ]
    last: list[str | TableCell] = ["c-student - a"]
    for prefix in sides.values():
        own = {f"{arm}-{seed}": rows[f"{prefix}{arm}-{seed}"] for arm in FRONT}
        last += [difference(contrast(own, [seed], "c-student", "a", PRIMARY)), "–"]
    headings = [Heading(key="arm"), *(Heading(key=f"{metric}, {name}") for name, metric in pairs)]
    return plain("", headings, [*lines, last])


def development_table(results: Results, seeds: Sequence[int]) -> Table:
    """Should the study's best models replace the demo weights? Of each family the best on the development images."""
    lines = []
    for demo, arms in (("demo-klvae", ("a", "d")), ("demo-ssdd", ("b", "c-teacher", "c-student", "c-control"))):
        candidates = [f"{arm}-{seed}" for arm in arms for seed in seeds]
        best = min(candidates, key=lambda name: number(results[name], PRIMARY) or np.inf)
        for name in (best, demo):
            lines.append([name, *(text(number(results[name], m), m) for m in (PRIMARY, "psnr"))])
    return plain("", [Heading(key="model"), metric_column(PRIMARY), metric_column("psnr")], lines)


def draw(folder: Path, out: Path, preset: str) -> None:
    """Quality against decode steps and against the time of a decode, the arms beside the teacher's curve."""
    results, seeds = read(folder / TEST), training_seeds(folder)
    quality = {arm: over_seeds(results, arm, seeds, PRIMARY) for arm in ARMS}
    quality |= {f"c-teacher{s}": over_seeds(results, "c-teacher", seeds, PRIMARY, s) for s in SUFFIXES.values()}
    lines = {arm: [(1.0, quality[arm])] for arm in ("c-student", "c-control", "a", "b")}
    lines["c-teacher"] = [(steps, quality[f"c-teacher{suffix}"]) for steps, suffix in SUFFIXES.items()]
    curves(lines, "decode steps", axis_label(metric_column(PRIMARY)), out / f"steps-{preset}.png")
    timed = {arm: timed_as(arm, seeds[0]) for arm in ARMS}
    timed |= {f"c-teacher{s}": f"c-teacher-{seeds[0]}{s}" for s in SUFFIXES.values() if s}
    points = []
    for name, record in timed.items():
        speed = speeds(folder)[record]
        time = 1000 / speed.stages["decode"].images_per_second
        points.append(Point(name, speed.tokenizer.family, time, quality[name]))
    fig = scatter(points, "decode (ms/img)", "lower", metric_column(PRIMARY))
    save(fig, out / f"quality-time-{preset}.png")


def strips(folder: Path, path: Path, seed: int) -> None:
    """Input and every arm's reconstruction of four photographs; without their pictures the strip stays as it is."""
    rows = []
    for real in sorted((folder / "+real.images").glob("*.png"))[:4]:
        files = [real, *(folder / f"{arm}-{seed}.images" / real.name for arm in ARMS)]
        pictures = [Image.open(file).convert("RGB").resize((160, 160), Image.Resampling.LANCZOS) for file in files]
        rows.append(np.concatenate([np.asarray(picture) for picture in pictures], 1))
    if rows:
        Image.fromarray(np.concatenate(rows)).save(path, quality=88)


if __name__ == "__main__":
    show(Path(sys.argv[1]), Path(sys.argv[-1]))
