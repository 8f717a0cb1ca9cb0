"""Tables and figures of the study from the records that run.py kept. REPORT.md, written by hand, holds these tables.

python results/study/analyse.py results/study/cpu [runs/study/cpu]     (the second has the pictures)
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from contrasts import Contrast, Tables, conclusions, contrast, crossed_bootstrap, holm, values, verdict
from PIL import Image
from run import ARMS, FRONT, STEPS

from tokbench.metrics import METRICS
from tokbench.records.files import per_image_path, read_per_image
from tokbench.records.result import EvalResult, SpeedResult, read_result, read_speed
from tokbench.report.columns import is_training_loss, metric_column
from tokbench.report.plots import Point, axis_label, figure, label_points, log_axis, save, scatter, styles
from tokbench.report.tables import Heading, Table, TableCell, TableRow, markdown, plain

TEST, DEVELOPMENT = Path("eval/adm/samples-256"), Path("eval/adm/development-256")
PRIMARY = "lpips-alex"  # endpoint
SHOWN = ("lpips-alex", "psnr", "ssim", "pd-mobilenet", "lpips-vgg")
CONTRASTS = (("c-student", "a"), ("c-student", "b"), ("c-student", "c-teacher"))
EXPLORATORY = (("c-student", "c-control"), ("b", "a"), ("d", "a"))
SUFFIXES = {steps: f"-steps{steps}" if steps > 1 else "" for steps in STEPS}
Results = dict[str, EvalResult]


def main() -> None:
    """Print the tables as Markdown and what follows from them; draw the figures beside this file."""
    folder, pictures = Path(sys.argv[1]), Path(sys.argv[-1])
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


def read_speeds(folder: Path) -> dict[str, SpeedResult]:
    """Speed records by name."""
    return {r.tokenizer.name: r for r in map(read_speed, sorted((folder / "speed").glob("*/*.json")))}


def training_seeds(folder: Path) -> list[int]:
    return sorted(int(path.stem.rpartition("-")[2]) for path in (folder / TEST).glob("a-*.json"))


def over_seeds(results: Results, arm: str, seeds: Sequence[int], metric: str, suffix: str = "") -> float:
    """A metric's mean over training seeds."""
    found = [results[f"{arm}-{seed}{suffix}"].metrics[metric].value for seed in seeds]
    return float(np.mean([value for value in found if value is not None]))


def text(value: float | None, metric: str) -> str:
    return "–" if value is None else f"{value:.{METRICS[metric].digits}f}"


def timed_as(arm: str, seed: int) -> str:
    """The speed record of an arm's network in one step."""
    return f"{'a' if arm in ('a', 'd') else 'c-student'}-{seed}"


def arms_table(results: Results, rows: Tables, seeds: Sequence[int], folder: Path) -> Table:
    """Means over seeds with their intervals, and the cost of each arm; student and control include the teacher's."""
    generator, speeds = np.random.default_rng(0), read_speeds(folder)
    made = []
    for arm in ARMS:
        result = results[f"{arm}-{seeds[0]}"]
        parts = ["c-teacher", arm] if arm in ("c-student", "c-control") else [arm]
        files = [folder / "training" / f"{part}-{seed}.json" for seed in seeds for part in parts]
        training = [json.loads(file.read_text()) for file in files]
        images, spent = (sum(record[key] for record in training) / len(seeds) for key in ("images_seen", "seconds"))
        speed = speeds[timed_as(arm, seeds[0])]
        cells = {
            "decoder": TableCell(f"{result.tokenizer.decoder_params / 1e6:.2f}"),
            "images": TableCell(f"{images:,.0f}"),
            "training": TableCell(f"{spent:,.0f}"),
            **{metric: arm_cell(result, rows, arm, seeds, metric, generator) for metric in SHOWN},
            "cost": TableCell(f"{speed.flops['decode'] / 1e9:.1f}"),
            "decode": TableCell(f"{speed.stages['decode'].images_per_second:.2f}"),
        }
        made.append(TableRow(arm, cells))
    columns = [
        Heading(key="decoder", unit="M"), Heading(key="images"), Heading(key="training", unit="s"),
        *map(metric_column, SHOWN), Heading(key="cost", unit="GFLOP"), Heading(key="decode", unit="img/s"),
    ]  # fmt: skip
    return Table(title="", names="arm", columns=columns, groups=[("", made)])


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
    made = []
    for c, p, said in judged:
        psnr = contrast(rows, seeds, c.arm, c.base, "psnr")
        made.append(
            TableRow(
                f"{c.arm} - {c.base}",
                {
                    f"Δ {PRIMARY}": TableCell(f"{c.mean:+.4f}", f"[{c.low:+.4f}, {c.high:+.4f}]"),
                    "p (Holm)": TableCell(p),
                    "by seed": TableCell(c.signs),
                    "Δ psnr": TableCell(f"{psnr.mean:+.2f}", f"[{psnr.low:+.2f}, {psnr.high:+.2f}]"),
                    "verdict": TableCell(said),
                },
            )
        )
    columns = [Heading(key=key, unit="dB" if "psnr" in key else "", words=key == "verdict") for key in made[0].cells]
    return Table(title="", names="contrast", columns=columns, groups=[("", made)])


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
    prefixes = {"SSDD's encoder": "front-", "KL-VAE's encoder": ""}
    made = []
    for arm in FRONT:
        sides = {name: results[f"{prefix}{arm}-{seed}"] for name, prefix in prefixes.items()}
        cells = {
            f"{metric}, {name}": TableCell(text(side.metrics[metric].value, metric))
            for name, side in sides.items()
            for metric in (PRIMARY, "psnr")
        }
        made.append(TableRow(arm, cells))
    keys = list(made[0].cells)
    last = {key: TableCell("–") for key in keys}
    for name, prefix in prefixes.items():
        own = {f"{arm}-{seed}": rows[f"{prefix}{arm}-{seed}"] for arm in FRONT}
        c = contrast(own, [seed], "c-student", "a", PRIMARY)
        last[f"{PRIMARY}, {name}"] = TableCell(f"{c.mean:+.4f}", f"[{c.low:+.4f}, {c.high:+.4f}]")
    made.append(TableRow("c-student - a", last))
    return Table(title="", names="arm", columns=[Heading(key=key) for key in keys], groups=[("", made)])


def development_table(results: Results, seeds: Sequence[int]) -> Table:
    """Should the study's best models replace the demo weights? Of each family the best on the development images."""
    lines = []
    for demo, arms in (("demo-klvae", ("a", "d")), ("demo-ssdd", ("b", "c-teacher", "c-student", "c-control"))):
        candidates = [f"{arm}-{seed}" for arm in arms for seed in seeds]
        best = min(candidates, key=lambda name: over_seeds(results, name.rpartition("-")[0], [int(name[-1])], PRIMARY))
        for name in (best, demo):
            lines.append([name, *(text(results[name].metrics[m].value, m) for m in (PRIMARY, "psnr"))])
    return plain("", [Heading(key="model"), metric_column(PRIMARY), metric_column("psnr")], lines)


def draw(folder: Path, out: Path, preset: str) -> None:
    """Quality against decode steps and against the time of a decode, the arms beside the teacher's curve."""
    results, seeds = read(folder / TEST), training_seeds(folder)
    curve = {steps: over_seeds(results, "c-teacher", seeds, PRIMARY, suffix) for steps, suffix in SUFFIXES.items()}
    fig, ax = figure()
    log_axis(ax.xaxis, list(curve))
    colours = styles(ARMS)
    ax.plot(list(curve), list(curve.values()), color=colours["c-teacher"][0], marker="o", markersize=4)
    points = [Point("c-teacher", "", 8, curve[8])]
    for arm in ("c-student", "c-control", "a", "b"):
        value = over_seeds(results, arm, seeds, PRIMARY)
        ax.plot([1], [value], color=colours[arm][0], marker=colours[arm][1], markersize=5, linestyle="none")
        points.append(Point(arm, "", 1, value))
    ax.set_xlabel("decode steps", fontsize=9)
    ax.set_ylabel(axis_label(metric_column(PRIMARY)), fontsize=9)
    ax.margins(x=0.25, y=0.15)
    label_points(ax, points)
    save(fig, out / f"steps-{preset}.png")
    speeds = read_speeds(folder)
    timed = {arm: (arm, "", timed_as(arm, seeds[0])) for arm in ARMS}
    timed |= {f"c-teacher{s}": ("c-teacher", s, f"c-teacher-{seeds[0]}{s}") for s in SUFFIXES.values() if s}
    points = [
        Point(
            name, results[f"{arm}-{seeds[0]}"].tokenizer.family,
            1000 / speeds[record].stages["decode"].images_per_second, over_seeds(results, arm, seeds, PRIMARY, suffix),
        )
        for name, (arm, suffix, record) in timed.items()
    ]  # fmt: skip
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
    main()
