"""Statistics, figures and REPORT.md of the study, from the files that run.py left: no number of it is typed in.

python results/study/analyse.py runs/study/cpu
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tokbench.metrics import METRICS
from tokbench.report.leaderboard import metric_column
from tokbench.report.plots import Point, axis_label, figure, label_points, log_axis, save, styles
from tokbench.result import EvalResult, read_result, read_speed
from tokbench.store import per_image_path, read_per_image, write_whole

HERE = Path(__file__).parent
DRAWS = 10_000
PRIMARY, MARGIN = "lpips-alex", 0.3  # endpoint; dB of psnr that do not count as inferior
SHOWN = ("lpips-alex", "psnr", "ssim", "pd-mobilenet", "lpips-vgg")
CONTRASTS = (("c-student", "a"), ("c-student", "b"), ("c-student", "c-teacher"))
EXPLORATORY = (("c-student", "c-control"), ("d", "a"))
ARMS = ("a", "b", "c-teacher", "c-student", "c-control", "d")


@dataclass(frozen=True)
class Contrast:
    """A difference of two arms with its crossed-bootstrap interval."""

    arm: str
    base: str
    metric: str
    mean: float
    low: float
    high: float
    p: float
    by_seed: tuple[float, ...]

    @property
    def seeds_agree(self) -> bool:
        return len({np.sign(value) for value in self.by_seed}) == 1


def main() -> None:
    """Read <folder>/eval and write the figures beside this file and REPORT.md."""
    folder = Path(sys.argv[1])
    results = {path.stem: read_result(path) for path in sorted((folder / "eval").glob("*/*/*.json"))}
    tables = {path.stem: read_per_image(per_image_path(path)) for path in sorted((folder / "eval").glob("*/*/*.json"))}
    seeds = sorted({int(name.rpartition("-")[2]) for name in results if name.startswith("a-")})
    preset = folder.name
    contrasts = [contrast(tables, seeds, arm, base, PRIMARY) for arm, base in CONTRASTS]
    report = [
        f"# The controlled study, preset `{preset}` (toy scale)",
        "",
        *opening(results, seeds, preset, folder),
        "## Arms",
        "",
        *arms_table(results, tables, seeds, folder),
        "## Contrasts",
        "",
        *contrasts_table(contrasts, tables, seeds),
        "## Decode steps",
        "",
        *steps_section(results, seeds, preset),
        *strips_section(folder, seeds, preset),
        "## Limits",
        "",
        *limits(results, seeds, preset),
    ]
    write_whole(HERE / "REPORT.md", "\n".join(report) + "\n")
    print(HERE / "REPORT.md")


def values(tables: dict, arm: str, seeds: list[int], metric: str) -> np.ndarray:
    """float64 [S, N]: per training seed and image."""
    return np.stack([tables[f"{arm}-{seed}"][1][metric] for seed in seeds])


def crossed_bootstrap(matrix: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Means [DRAWS] of [S, N] with seeds and images drawn anew, each with replacement."""
    num_seeds, num_images = matrix.shape
    rows = generator.integers(num_seeds, size=(DRAWS, num_seeds))
    columns = generator.integers(num_images, size=(DRAWS, num_images))
    weights = np.stack([np.bincount(draw, minlength=num_images) for draw in columns]) / num_images
    by_seed = weights @ matrix.T  # [DRAWS, S]
    return np.take_along_axis(by_seed, rows, axis=1).mean(1)


def contrast(tables: dict, seeds: list[int], arm: str, base: str, metric: str) -> Contrast:
    """arm - base on a metric, paired by image and seed."""
    difference = values(tables, arm, seeds, metric) - values(tables, base, seeds, metric)
    draws = crossed_bootstrap(difference, np.random.default_rng(0))
    low, high = np.quantile(draws, [0.025, 0.975])
    tail = min((draws <= 0).sum(), (draws >= 0).sum())
    p = min(1.0, 2 * (tail + 1) / (DRAWS + 1))
    return Contrast(
        arm, base, metric, float(difference.mean()), float(low), float(high), float(p), tuple(difference.mean(1))
    )


def holm(p_values: list[float]) -> list[float]:
    """Holm's step-down adjustment, in the order given."""
    order = np.argsort(p_values)
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


def opening(results: dict[str, EvalResult], seeds: list[int], preset: str, folder: Path) -> list[str]:
    """What was done, on what, and its standing."""
    first, noisy = results[f"a-{seeds[0]}"], results[f"c-student-{seeds[0]}"]
    standing = "**Exploratory: this preset decides nothing.** " if preset == "cpu" else ""
    return [
        f"{standing}The design was fixed beforehand in [PLAN.md](PLAN.md). {len(seeds)} training seeds, "
        f"{first.dataset.num_images} test photographs at {first.dataset.resolution} px, protocol `{first.protocol}`, "
        f"{len(noisy.settings['seeds'])} noise seeds an image for stochastic decoders. "
        f"Measured on {first.provenance['device']}, {str(first.provenance['date'])[:10]}.",
        "",
        f"Repeat: `make study PRESET={preset} TRAIN=PHOTOS`. Data of this page: `{folder}/`.",
        "",
    ]


def arms_table(results: dict[str, EvalResult], tables: dict, seeds: list[int], folder: Path) -> list[str]:
    """Means over seeds with their intervals, and the cost of each arm."""
    generator = np.random.default_rng(0)
    speeds = {r.tokenizer.name: r for r in map(read_speed, sorted((folder / "speed").glob("*/*.json")))}
    heads = [
        "arm",
        "decoder, M",
        "images",
        "training, s",
        *(metric_column(m).heading for m in SHOWN),
        "decode, GFLOP",
        "decode, img/s",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|--:" * (len(heads) - 1) + "|"]
    for arm in ARMS:
        info = results[f"{arm}-{seeds[0]}"].tokenizer
        seconds = [json.loads((folder / f"{arm}-{seed}" / "seconds.json").read_text())["seconds"] for seed in seeds]
        cells = [
            arm,
            f"{info.decoder_params / 1e6:.2f}",
            f"{images_seen(folder, arm, seeds[0]):,}",
            f"{np.mean(seconds):,.0f}",
        ]
        for metric in SHOWN:
            digits, dagger = METRICS[metric].digits, "†" if metric in info.losses else ""
            if metric in tables[f"{arm}-{seeds[0]}"][1]:
                matrix = values(tables, arm, seeds, metric)
                low, high = np.quantile(crossed_bootstrap(matrix, generator), [0.025, 0.975])
                cells.append(f"{matrix.mean():.{digits}f}{dagger} [{low:.{digits}f}, {high:.{digits}f}]")
            else:
                means = [results[f"{arm}-{seed}"].metrics[metric].value for seed in seeds]
                cells.append(f"{np.mean([m for m in means if m is not None]):.{digits}f}{dagger}")
        speed = speeds.get(
            arm
            if arm in speeds
            else {"d": "a", "b": "c-student", "c-teacher": "c-student", "c-control": "c-student"}.get(arm, "")
        )
        stage = speed.stages.get("decode") if speed else None
        cells += [
            f"{speed.flops['decode'] / 1e9:.1f}" if speed else "–",
            f"{stage.images_per_second:.2f}" if stage else "–",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return [
        *lines,
        "",
        "† trained on this network. Brackets: crossed bootstrap over images and seeds, 95 %. One decode step.",
        "Student and control",
        "include the teacher's images. FLOP = 2 x MAC; arms of one network share its speed.",
        "",
    ]


def images_seen(folder: Path, arm: str, seed: int) -> int:
    """Training images of an arm, its teacher's included."""
    counted = 0
    for name in {arm, "c-teacher"} if arm.startswith("c-") else {arm}:
        command = json.loads((folder / f"{name}-{seed}" / "seconds.json").read_text())["command"]
        settings = dict(part.split("=", 1) for part in command.split() if "=" in part)
        counted += int(settings["run.steps"]) * int(settings["run.batch_size"])
    return counted


def contrasts_table(contrasts: list[Contrast], tables: dict, seeds: list[int]) -> list[str]:
    """The three planned contrasts with Holm's correction and verdicts, then the exploratory ones."""
    adjusted = holm([c.p for c in contrasts])
    lines = [
        f"| contrast | Δ {PRIMARY} | 95 % interval | p (Holm) | seeds | Δ psnr, dB [95 %] | verdict |",
        "|---|--:|--:|--:|---|--:|---|",
    ]
    for c, p in zip(contrasts, adjusted, strict=True):
        quality = contrast(tables, seeds, c.arm, c.base, "psnr")
        lines.append(_contrast_row(c, f"{p:.4f}", quality, verdict(c, p, quality)))
    for arm, base in EXPLORATORY:
        c, quality = (contrast(tables, seeds, arm, base, metric) for metric in (PRIMARY, "psnr"))
        lines.append(_contrast_row(c, f"{c.p:.4f}, not corrected", quality, "exploratory"))
    return [
        *lines,
        "",
        f"Lower {PRIMARY} is better: a negative difference favours the first arm.",
        f"PSNR is non-inferior when its interval stays above -{MARGIN} dB.",
        "",
    ]


def _contrast_row(c: Contrast, p: str, quality: Contrast, text: str) -> str:
    agree = "agree" if c.seeds_agree else "disagree"
    return (
        f"| {c.arm} - {c.base} | {c.mean:+.4f} | [{c.low:+.4f}, {c.high:+.4f}] | {p} | {agree} "
        f"| {quality.mean:+.2f} [{quality.low:+.2f}, {quality.high:+.2f}] | {text} |"
    )


def verdict(c: Contrast, p: float, quality: Contrast) -> str:
    """A claim only if the corrected test and every seed agree."""
    if p >= 0.05 or not c.seeds_agree:
        return "not resolved"
    if c.mean > 0:
        return f"{c.arm} worse"
    return f"{c.arm} better" + ("" if quality.low > -MARGIN else ", but psnr may be inferior")


def steps_section(results: dict[str, EvalResult], seeds: list[int], preset: str) -> list[str]:
    """The teacher over its steps beside student and control at one."""
    curve = {}
    for steps in (1, 2, 4, 8):
        names = [f"c-teacher-{seed}" + (f"-steps{steps}" if steps > 1 else "") for seed in seeds]
        curve[steps] = [np.mean([results[name].metrics[m].value for name in names]) for m in (PRIMARY, "psnr")]
    lines = [f"| steps | teacher {PRIMARY} | teacher psnr, dB |", "|--:|--:|--:|"]
    lines += [f"| {steps} | {lpips:.4f} | {psnr:.2f} |" for steps, (lpips, psnr) in curve.items()]
    fig, ax = figure()
    log_axis(ax.xaxis, list(curve))
    colours = styles(["c-teacher", "c-student", "c-control", "a", "b"])
    ax.plot(list(curve), [pair[0] for pair in curve.values()], color=colours["c-teacher"][0], marker="o", markersize=4)
    points = [Point("c-teacher", "", 8, curve[8][0])]
    for arm in ("c-student", "c-control", "a", "b"):
        value = float(np.mean([results[f"{arm}-{seed}"].metrics[PRIMARY].value for seed in seeds]))
        ax.plot([1], [value], color=colours[arm][0], marker=colours[arm][1], markersize=5, linestyle="none")
        points.append(Point(arm, "", 1, value))
    ax.set_xlabel("decode steps", fontsize=9)
    ax.set_ylabel(axis_label(metric_column(PRIMARY)), fontsize=9)
    ax.margins(x=0.25, y=0.15)
    label_points(ax, points)
    save(fig, HERE / f"steps-{preset}.png")
    return [*lines, "", f"![quality against decode steps](steps-{preset}.png)", ""]


def strips_section(folder: Path, seeds: list[int], preset: str) -> list[str]:
    """Input and every arm's reconstruction of four photographs, where the run kept them."""
    place = next((folder / "eval").glob("*/*/"), folder)
    rows = []
    for real in sorted((place / "+real.images").glob("*.png"))[:4]:
        files = [real, *(place / f"{arm}-{seeds[0]}.images" / real.name for arm in ARMS)]
        if all(file.exists() for file in files):
            rows.append(
                np.concatenate([np.asarray(Image.open(file).convert("RGB").resize((160, 160))) for file in files], 1)
            )
    if not rows:
        return []
    Image.fromarray(np.concatenate(rows)).save(HERE / f"strips-{preset}.jpg", quality=88)
    return [
        "## Pictures",
        "",
        f"Input, {', '.join(ARMS)} (seed {seeds[0]}).",
        "",
        f"![reconstructions](strips-{preset}.jpg)",
        "",
    ]


def limits(results: dict[str, EvalResult], seeds: list[int], preset: str) -> list[str]:
    """What this cannot say."""
    num_images = results[f"a-{seeds[0]}"].dataset.num_images
    few = f"{len(seeds)} seeds bound the spread between trainings loosely. " if len(seeds) < 5 else ""
    return [
        f"- {few}{num_images} photographs resolve differences of about 0.02 {PRIMARY} and 0.4 dB.",
        "- Networks of about five million parameters on 128 photographs: nothing here carries over by itself.",
        "- The encoder comes from KL-VAE training, which may favour the convolutional arms.",
        *(
            ["- A few minutes of training an arm: all are far from converged; how fast they learn is compared."]
            if preset == "cpu"
            else []
        ),
    ]


if __name__ == "__main__":
    main()
