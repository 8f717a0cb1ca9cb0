"""Statistics, figures and REPORT.md of the study, from the records that run.py kept: no number of it is typed in.

python results/study/analyse.py results/study/cpu [runs/study/cpu]     (the second has the pictures)
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tokbench.metrics import METRICS
from tokbench.report.columns import metric_column
from tokbench.report.plots import Point, axis_label, figure, label_points, log_axis, quality_vs_time, save, styles
from tokbench.result import EvalResult, read_result, read_speed
from tokbench.store import per_image_path, read_per_image, write_whole

HERE = Path(__file__).parent
DRAWS = 10_000
PRIMARY, MARGIN = "lpips-alex", 0.3  # endpoint; dB of psnr that do not count as inferior
SHOWN = ("lpips-alex", "psnr", "ssim", "pd-mobilenet", "lpips-vgg")
CONTRASTS = (("c-student", "a"), ("c-student", "b"), ("c-student", "c-teacher"))
EXPLORATORY = (("c-student", "c-control"), ("d", "a"))
ARMS = ("a", "b", "c-teacher", "c-student", "c-control", "d")
FRONT = ("a", "c-teacher", "c-student")


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
    """Read the records and write the figures beside this file and REPORT.md."""
    folder, pictures = Path(sys.argv[1]), Path(sys.argv[-1])
    results, tables = read(folder / "eval" / "adm" / "samples-256")
    development, _ = read(folder / "eval" / "adm" / "development-256")
    seeds = sorted({int(name.rpartition("-")[2]) for name in results if name.startswith("a-")})
    preset = folder.name
    report = [
        f"# The controlled study, preset `{preset}` (toy scale)",
        "",
        *opening(results, seeds, preset),
        "## Arms",
        "",
        *arms_table(results, tables, seeds, folder),
        "## Contrasts",
        "",
        *contrasts_table(tables, seeds),
        "## Decode steps and time",
        "",
        *steps_section(results, seeds, preset),
        "## On an encoder trained by SSDD",
        "",
        *front_section(results, tables, seeds, folder),
        "## Pictures",
        "",
        *strips_section(pictures / "eval" / "adm" / "samples-256", seeds, preset),
        "## Against the bundled weights",
        "",
        *development_section(development, seeds),
        "## Limits",
        "",
        *limits(results, seeds, preset),
    ]
    write_whole(HERE / "REPORT.md", "\n".join(report) + "\n")
    print(HERE / "REPORT.md")


def read(folder: Path) -> tuple[dict[str, EvalResult], dict[str, dict[str, np.ndarray]]]:
    """Results and per-image columns by name; a stochastic decoder's are averaged over its noise seeds already."""
    paths = sorted(folder.glob("*.json"))
    return {p.stem: read_result(p) for p in paths}, {p.stem: read_per_image(per_image_path(p))[1] for p in paths}


def table(heads: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table, first column left, and an empty line."""
    lines = [heads, ["---", *["--:"] * (len(heads) - 1)], *rows]
    return [*("| " + " | ".join(line) + " |" for line in lines), ""]


def values(tables: dict, arm: str, seeds: list[int], metric: str) -> np.ndarray:
    """float64 [S, N]: per training seed and image."""
    return np.stack([tables[f"{arm}-{seed}"][metric] for seed in seeds])


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


def opening(results: dict[str, EvalResult], seeds: list[int], preset: str) -> list[str]:
    """What was done, on what, and its standing."""
    first, noisy = results[f"a-{seeds[0]}"], results[f"c-student-{seeds[0]}"]
    standing = "**Exploratory: this preset decides nothing.** " if preset == "cpu" else ""
    return [
        f"{standing}The design was fixed beforehand in [PLAN.md](PLAN.md). {len(seeds)} training seeds, "
        f"{first.dataset.num_images} test photographs at {first.dataset.resolution} px, protocol `{first.protocol}`, "
        f"{len(noisy.settings['seeds'])} noise seeds an image for stochastic decoders. "
        f"Measured on {first.provenance['device']}, {str(first.provenance['date'])[:10]}.",
        "",
        f"Repeat: `make study PRESET={preset} TRAIN=PHOTOS`. The records of this page are in [{preset}/]({preset}/).",
        "",
    ]


def arms_table(results: dict[str, EvalResult], tables: dict, seeds: list[int], folder: Path) -> list[str]:
    """Means over seeds with their intervals, and the cost of each arm."""
    generator = np.random.default_rng(0)
    speeds = {r.tokenizer.name: r for r in map(read_speed, sorted((folder / "speed").glob("*/*.json")))}
    shown = [metric_column(m).heading for m in SHOWN]
    heads = ["arm", "decoder, M", "images", "training, s", *shown, "decode, GFLOP", "decode, img/s"]
    rows = []
    for arm in ARMS:
        info = results[f"{arm}-{seeds[0]}"].tokenizer
        records = [
            json.loads((folder / f"{name}-{seed}" / "seconds.json").read_text())
            for seed in seeds
            for name in parts(arm)
        ]
        spent = sum(record["seconds"] for record in records) / len(seeds)
        cells = [arm, f"{info.decoder_params / 1e6:.2f}", f"{images_seen(records) // len(seeds):,}", f"{spent:,.0f}"]
        for metric in SHOWN:
            digits, dagger = METRICS[metric].digits, "†" if metric in info.losses else ""
            if metric in tables[f"{arm}-{seeds[0]}"]:
                matrix = values(tables, arm, seeds, metric)
                low, high = np.quantile(crossed_bootstrap(matrix, generator), [0.025, 0.975])
                cells.append(f"{matrix.mean():.{digits}f}{dagger} [{low:.{digits}f}, {high:.{digits}f}]")
            else:
                cells.append(f"{over_seeds(results, arm, seeds, metric):.{digits}f}{dagger}")
        speed = speeds[f"{'a' if arm in ('a', 'd') else 'c-student'}-{seeds[0]}"]
        rows.append([*cells, f"{speed.flops['decode'] / 1e9:.1f}", f"{speed.stages['decode'].images_per_second:.2f}"])
    return [
        *table(heads, rows),
        "† trained on this network. Brackets: crossed bootstrap over images and seeds, 95 %. One decode step.",
        "Images and seconds of student and control include the teacher's. FLOP = 2 x MAC; arms of one network share",
        "its speed. Training seconds are wall time on a machine that had other work too: no comparison of speed.",
        "",
    ]


def parts(arm: str) -> list[str]:
    """The arms whose training went into this one."""
    return ["c-teacher", arm] if arm in ("c-student", "c-control") else [arm]


def over_seeds(results: dict[str, EvalResult], arm: str, seeds: list[int], metric: str, suffix: str = "") -> float:
    """A metric's mean over training seeds."""
    return float(np.mean([results[f"{arm}-{seed}{suffix}"].metrics[metric].value for seed in seeds]))


def images_seen(records: list[dict]) -> int:
    """Training images of these commands."""
    counted = 0
    for record in records:
        settings = dict(part.split("=", 1) for part in record["command"].split() if "=" in part)
        counted += int(settings["run.steps"]) * int(settings["run.batch_size"])
    return counted


def contrasts_table(tables: dict, seeds: list[int]) -> list[str]:
    """The three planned contrasts with Holm's correction and verdicts, then the exploratory ones."""
    planned = [contrast(tables, seeds, arm, base, PRIMARY) for arm, base in CONTRASTS]
    rows, claims = [], {}
    for c, p in zip(planned, holm([c.p for c in planned]), strict=True):
        quality = contrast(tables, seeds, c.arm, c.base, "psnr")
        claims[c.base] = verdict(c, p, quality)
        rows.append(contrast_row(c, f"{p:.4f}", quality, claims[c.base]))
    for arm, base in EXPLORATORY:
        c, quality = (contrast(tables, seeds, arm, base, metric) for metric in (PRIMARY, "psnr"))
        rows.append(contrast_row(c, "–", quality, "exploratory"))
    heads = ["contrast", f"Δ {PRIMARY}", "95 % interval", "p (Holm)", "signs of the seeds", "Δ psnr, dB", "verdict"]
    return [
        *table(heads, rows),
        f"Lower {PRIMARY} is better: a negative difference favours the first arm. PSNR is non-inferior when its",
        f"interval stays above -{MARGIN} dB. Intervals: 95 % of {DRAWS:,} draws of the crossed bootstrap, uncorrected;",
        "p: from the same draws, Holm-corrected over the three planned contrasts.",
        "",
        "What the plan counts:",
        "",
        *table(["criterion", "met"], criteria(tables, seeds, claims)),
    ]


def criteria(tables: dict, seeds: list[int], claims: dict[str, str]) -> list[list[str]]:
    """PLAN.md's list of what would count for and against each side, from the verdicts by the arm compared with."""
    psnr = contrast(tables, seeds, "c-student", "a", "psnr")
    control = contrast(tables, seeds, "c-student", "c-control", PRIMARY)
    met = {
        "for SSDD: c-student below a, psnr not inferior": claims["a"] == "c-student better",
        "for diffusion as its cause: that, and c-student below b": claims["a"] == "c-student better"
        and claims["b"].startswith("c-student better"),
        "for distillation: c-student below c-teacher and below c-control (not corrected)": claims[
            "c-teacher"
        ].startswith("c-student better")
        and control.high < 0,
        "against SSDD: a below c-student, or psnr inferior": claims["a"] == "c-student worse" or psnr.high < -MARGIN,
        "against diffusion as the cause: b below c-student": claims["b"] == "c-student worse",
    }
    return [[criterion, "yes" if held else "no"] for criterion, held in met.items()]


def contrast_row(c: Contrast, p: str, quality: Contrast, text: str) -> list[str]:
    interval, signs = f"[{c.low:+.4f}, {c.high:+.4f}]", "agree" if c.seeds_agree else "disagree"
    psnr = f"{quality.mean:+.2f} [{quality.low:+.2f}, {quality.high:+.2f}]"
    return [f"{c.arm} - {c.base}", f"{c.mean:+.4f}", interval, p, signs, psnr, text]


def verdict(c: Contrast, p: float, quality: Contrast) -> str:
    """A claim only if the corrected test and every seed agree."""
    if p >= 0.05 or not c.seeds_agree:
        return "not resolved"
    if c.mean > 0:
        return f"{c.arm} worse"
    return f"{c.arm} better" + ("" if quality.low > -MARGIN else ", but psnr may be inferior")


def steps_section(results: dict[str, EvalResult], seeds: list[int], preset: str) -> list[str]:
    """The teacher over its steps beside the other arms at one; quality against decoding time."""
    suffixes = {steps: f"-steps{steps}" if steps > 1 else "" for steps in (1, 2, 4, 8)}
    curve = {
        steps: [over_seeds(results, "c-teacher", seeds, metric, suffix) for metric in (PRIMARY, "psnr")]
        for steps, suffix in suffixes.items()
    }
    fig, ax = figure()
    log_axis(ax.xaxis, list(curve))
    colours = styles(ARMS)
    ax.plot(list(curve), [pair[0] for pair in curve.values()], color=colours["c-teacher"][0], marker="o", markersize=4)
    points = [Point("c-teacher", "", 8, curve[8][0])]
    for arm in ("c-student", "c-control", "a", "b"):
        value = over_seeds(results, arm, seeds, PRIMARY)
        ax.plot([1], [value], color=colours[arm][0], marker=colours[arm][1], markersize=5, linestyle="none")
        points.append(Point(arm, "", 1, value))
    ax.set_xlabel("decode steps", fontsize=9)
    ax.set_ylabel(axis_label(metric_column(PRIMARY)), fontsize=9)
    ax.margins(x=0.25, y=0.15)
    label_points(ax, points)
    save(fig, HERE / f"steps-{preset}.png")
    first = [results[f"{arm}-{seeds[0]}"] for arm in ARMS]
    first += [results[f"c-teacher-{seeds[0]}{suffix}"] for suffix in suffixes.values() if suffix]
    quality_vs_time(first, HERE / f"quality-time-{preset}.png", PRIMARY)
    rows = [[str(steps), f"{lpips:.4f}", f"{psnr:.2f}"] for steps, (lpips, psnr) in curve.items()]
    return [
        *table(["steps of c-teacher", PRIMARY, "psnr, dB"], rows),
        f"![quality against decode steps](steps-{preset}.png)",
        "",
        f"Quality against the time of a decode as measured by `tokbench run`, seed {seeds[0]}:",
        "",
        f"![quality against decode time](quality-time-{preset}.png)",
        "",
    ]


def front_section(results: dict[str, EvalResult], tables: dict, seeds: list[int], folder: Path) -> list[str]:
    """One seed of (a) and (c) on an encoder that SSDD trained: does the encoder's origin matter?"""
    seed, trained = seeds[0], json.loads((folder / "front" / "encoder" / "seconds.json").read_text())
    rows = []
    for arm in FRONT:
        cells = []
        for name in (f"front-{arm}-{seed}", f"{arm}-{seed}"):
            cells += [
                f"{results[name].metrics[metric].value:.{METRICS[metric].digits}f}" for metric in (PRIMARY, "psnr")
            ]
        rows.append([arm, *cells])
    prefixed = {name.removeprefix("front-"): columns for name, columns in tables.items() if name.startswith("front-")}
    either = [contrast(of, [seed], "c-student", "a", PRIMARY) for of in (prefixed, tables)]
    differences = [f"{c.mean:+.4f} [{c.low:+.4f}, {c.high:+.4f}]" for c in either]
    heads = ["arm", f"{PRIMARY}, SSDD's encoder", "psnr, dB", f"{PRIMARY}, KL-VAE's encoder", "psnr, dB"]
    return [
        f"One training seed ({seed}); the encoder saw {images_seen([trained]):,} crops together with an SSDD decoder;",
        "its latents are normalised. Exploratory.",
        "",
        *table(heads, rows),
        f"c-student - a in {PRIMARY}: {differences[0]} on SSDD's encoder, {differences[1]} on the KL-VAE's",
        "(bootstrap over images).",
        "",
    ]


def strips_section(folder: Path, seeds: list[int], preset: str) -> list[str]:
    """Input and every arm's reconstruction of four photographs; without their pictures the strip stays as it is."""
    rows = []
    for real in sorted((folder / "+real.images").glob("*.png"))[:4]:
        files = [real, *(folder / f"{arm}-{seeds[0]}.images" / real.name for arm in ARMS)]
        pictures = [Image.open(file).convert("RGB").resize((160, 160), Image.Resampling.LANCZOS) for file in files]
        rows.append(np.concatenate([np.asarray(picture) for picture in pictures], 1))
    if rows:
        Image.fromarray(np.concatenate(rows)).save(HERE / f"strips-{preset}.jpg", quality=88)
    return [f"Input, {', '.join(ARMS)} (seed {seeds[0]}).", "", f"![reconstructions](strips-{preset}.jpg)", ""]


def development_section(development: dict[str, EvalResult], seeds: list[int]) -> list[str]:
    """Should the study's best models replace the demo weights? Decided on the development photographs."""
    rows, better = [], []
    for demo, arms in (("demo-klvae", ("a", "d")), ("demo-ssdd", ("b", "c-teacher", "c-student", "c-control"))):
        candidates = [f"{arm}-{seed}" for arm in arms for seed in seeds]
        best = min(candidates, key=lambda name: development[name].metrics[PRIMARY].value)
        if development[best].metrics[PRIMARY].value < development[demo].metrics[PRIMARY].value:
            better.append(best)
        rows += [
            [name, *(f"{development[name].metrics[m].value:.{METRICS[m].digits}f}" for m in (PRIMARY, "psnr"))]
            for name in (best, demo)
        ]
    count = development[demo].dataset.num_images
    return [
        f"The {count} development photographs, one noise seed; of each family the study's best by {PRIMARY}, and the",
        "bundled weights.",
        "",
        *table(["model", PRIMARY, "psnr, dB"], rows),
        f"Better than the bundled weights: {', '.join(better) or 'none; they stay as they are'}.",
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
