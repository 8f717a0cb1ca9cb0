"""Statistics, figures and REPORT.md of the study, from the records that run.py kept: no number of it is typed in.

python results/study/analyse.py results/study/cpu [runs/study/cpu]     (the second has the pictures)
"""

import json
import sys
from pathlib import Path

import numpy as np
from contrasts import DRAWS, Contrast, conclusions, contrast, crossed_bootstrap, holm, values, verdict
from PIL import Image
from run import ARMS, FRONT, STEPS

from tokbench.metrics import METRICS
from tokbench.records.files import per_image_path, read_per_image, write_whole
from tokbench.records.result import EvalResult, SpeedResult, read_result, read_speed
from tokbench.report.columns import metric_column
from tokbench.report.plots import Point, axis_label, figure, label_points, log_axis, save, scatter, styles

HERE = Path(__file__).parent
PRIMARY = "lpips-alex"  # endpoint
SHOWN = ("lpips-alex", "psnr", "ssim", "pd-mobilenet", "lpips-vgg")
CONTRASTS = (("c-student", "a"), ("c-student", "b"), ("c-student", "c-teacher"))
EXPLORATORY = (("c-student", "c-control"), ("b", "a"), ("d", "a"))


def main() -> None:
    """Read the records and write the figures beside this file and REPORT.md."""
    folder, pictures = Path(sys.argv[1]), Path(sys.argv[-1])
    test = Path("eval", "adm", "samples-256")
    results, tables = read(folder / test), read_tables(folder / test)
    development = read(folder / "eval" / "adm" / "development-256")
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
        *contrasts_table(tables, seeds, preset),
        "## Decode steps and time",
        "",
        *steps_section(results, seeds, preset, folder),
        "## On an encoder trained by SSDD",
        "",
        *front_section(results, tables, seeds, folder),
        "## Pictures",
        "",
        *strips_section(pictures / test, seeds, preset),
        "## Against the bundled weights",
        "",
        *development_section(development, seeds),
        "## Limits",
        "",
        *limits(results, tables, seeds, preset),
    ]
    write_whole(HERE / "REPORT.md", "\n".join(report) + "\n")
    print(HERE / "REPORT.md")


def read(folder: Path) -> dict[str, EvalResult]:
    """Results by name."""
    return {path.stem: read_result(path) for path in sorted(folder.glob("*.json"))}


def read_tables(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """Per-image columns by name; a stochastic decoder's are averaged over its noise seeds already."""
    tables = {path.stem: read_per_image(per_image_path(path)) for path in sorted(folder.glob("*.json"))}
    assert len({tuple(ids) for ids, _ in tables.values()}) == 1, "differences are paired by image"
    return {name: columns for name, (_, columns) in tables.items()}


def table(heads: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table, first column left, and an empty line."""
    lines = [heads, ["---", *["--:"] * (len(heads) - 1)], *rows]
    return [*("| " + " | ".join(line) + " |" for line in lines), ""]


def opening(results: dict[str, EvalResult], seeds: list[int], preset: str) -> list[str]:
    """What was done, on what, and its standing."""
    first, noisy = results[f"a-{seeds[0]}"], results[f"c-student-{seeds[0]}"]
    standing = "**Exploratory: this preset decides nothing.** " if preset == "cpu" else ""
    return [
        f"{standing}The design was fixed beforehand in [PLAN.md](PLAN.md). {len(seeds)} training seeds, "
        f"{first.dataset.num_images} test photographs at {first.dataset.resolution} px, protocol `{first.protocol}`, "
        f"{len(noisy.settings.seeds)} noise seeds an image for stochastic decoders. "
        f"Measured on {first.provenance.device}, {first.provenance.date[:10]}.",
        "",
        f"Repeat: `make study PRESET={preset} TRAIN=PHOTOS`. The records of this page are in [{preset}/]({preset}/).",
        "",
    ]


def arms_table(results: dict[str, EvalResult], tables: dict, seeds: list[int], folder: Path) -> list[str]:
    """Means over seeds with their intervals, and the cost of each arm."""
    generator = np.random.default_rng(0)
    speeds = read_speeds(folder)
    shown = [metric_column(m).heading for m in SHOWN]
    heads = ["arm", "decoder, M", "images", "training, s", *shown, "decode, GFLOP", "decode, img/s"]
    rows = []
    for arm in ARMS:
        info = results[f"{arm}-{seeds[0]}"].tokenizer
        training = [read_training(folder, f"{name}-{seed}") for seed in seeds for name in parts(arm)]
        images, spent = (sum(record[key] for record in training) / len(seeds) for key in ("images_seen", "seconds"))
        cells = [arm, f"{info.decoder_params / 1e6:.2f}", f"{images:,.0f}", f"{spent:,.0f}"]
        for metric in SHOWN:
            digits, dagger = METRICS[metric].digits, "†" if metric in info.losses else ""
            if metric in tables[f"{arm}-{seeds[0]}"]:
                matrix = values(tables, arm, seeds, metric)
                low, high = np.quantile(crossed_bootstrap(matrix, generator), [0.025, 0.975])
                cells.append(f"{matrix.mean():.{digits}f}{dagger} [{low:.{digits}f}, {high:.{digits}f}]")
            else:
                cells.append(f"{over_seeds(results, arm, seeds, metric):.{digits}f}{dagger}")
        speed = speeds[timed_as(arm, seeds[0])]
        rows.append([*cells, f"{speed.flops['decode'] / 1e9:.1f}", f"{speed.stages['decode'].images_per_second:.2f}"])
    return [
        *table(heads, rows),
        "† trained on this network. Brackets: crossed bootstrap over images and seeds, 95 %. One decode step.",
        "Images and seconds of student and control include the teacher's. FLOP = 2 x MAC; arms of one network share",
        "its speed. Training seconds are wall time on a machine that had other work too: no comparison of speed.",
        "",
    ]


def read_speeds(folder: Path) -> dict[str, SpeedResult]:
    """Speed records by name."""
    return {r.tokenizer.name: r for r in map(read_speed, sorted((folder / "speed").glob("*/*.json")))}


def timed_as(arm: str, seed: int) -> str:
    """The speed record of an arm's network in one step."""
    return f"{'a' if arm in ('a', 'd') else 'c-student'}-{seed}"


def parts(arm: str) -> list[str]:
    """The arms whose training went into this one."""
    return ["c-teacher", arm] if arm in ("c-student", "c-control") else [arm]


def over_seeds(results: dict[str, EvalResult], arm: str, seeds: list[int], metric: str, suffix: str = "") -> float:
    """A metric's mean over training seeds."""
    return float(np.mean([results[f"{arm}-{seed}{suffix}"].metrics[metric].value for seed in seeds]))


def read_training(folder: Path, name: str) -> dict:
    """What a trained model says of its training: images_seen, seconds, command, settings."""
    return json.loads((folder / "training" / f"{name}.json").read_text())


def contrasts_table(tables: dict, seeds: list[int], preset: str) -> list[str]:
    """The three planned contrasts with Holm's correction and verdicts, then the exploratory ones; what follows."""
    planned = [contrast(tables, seeds, arm, base, PRIMARY) for arm, base in CONTRASTS]
    rows, verdicts = [], {}
    for c, p in zip(planned, holm([c.p for c in planned]), strict=True):
        verdicts[c.base] = verdict(c, p)
        rows.append(contrast_row(c, tables, seeds, f"{p:.4f}", f"{c.arm} {verdicts[c.base]}"))
    for arm, base in EXPLORATORY:
        c = contrast(tables, seeds, arm, base, PRIMARY)
        rows.append(contrast_row(c, tables, seeds, "–", "exploratory"))
        verdicts[base] = verdicts.get(base, verdict(c, c.p))
    heads = ["contrast", f"Δ {PRIMARY}", "95 % interval", "p (Holm)", "by seed", "Δ psnr, dB", "verdict"]
    answers = conclusions(verdicts, contrast(tables, seeds, "c-student", "a", "psnr"))
    standing = " (exploratory: this preset decides nothing)" if preset == "cpu" else ""
    return [
        *table(heads, rows),
        f"Lower {PRIMARY} is better: a negative difference favours the first arm. Intervals: 95 % of {DRAWS:,} draws",
        "of the crossed bootstrap, uncorrected; p: from the same draws, Holm-corrected over the planned contrasts.",
        "A verdict needs p < 0.05 and one sign in all seeds.",
        "",
        f"What follows by the plan{standing}:",
        "",
        *(f"- {question}: **{answer}**" for question, answer in answers.items()),
        "",
    ]


def contrast_row(c: Contrast, tables: dict, seeds: list[int], p: str, text: str) -> list[str]:
    quality = contrast(tables, seeds, c.arm, c.base, "psnr")
    interval = f"[{c.low:+.4f}, {c.high:+.4f}]"
    psnr = f"{quality.mean:+.2f} [{quality.low:+.2f}, {quality.high:+.2f}]"
    return [f"{c.arm} - {c.base}", f"{c.mean:+.4f}", interval, p, c.signs, psnr, text]


def steps_section(results: dict[str, EvalResult], seeds: list[int], preset: str, folder: Path) -> list[str]:
    """The teacher over its steps beside the other arms at one; quality against decoding time."""
    suffixes = {steps: f"-steps{steps}" if steps > 1 else "" for steps in STEPS}
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
    times = {name: 1000 / speed.stages["decode"].images_per_second for name, speed in read_speeds(folder).items()}
    timed = [(arm, "", times[timed_as(arm, seeds[0])]) for arm in ARMS]
    timed += [("c-teacher", suffix, times[f"c-teacher-{seeds[0]}{suffix}"]) for suffix in suffixes.values() if suffix]
    points = [
        Point(
            arm + suffix,
            results[f"{arm}-{seeds[0]}"].tokenizer.family,
            time,
            over_seeds(results, arm, seeds, PRIMARY, suffix),
        )
        for arm, suffix, time in timed
    ]
    save(
        scatter(points, "decode (ms/img)", "lower", metric_column(PRIMARY), log=True),
        HERE / f"quality-time-{preset}.png",
    )
    rows = [[str(steps), f"{lpips:.4f}", f"{psnr:.2f}"] for steps, (lpips, psnr) in curve.items()]
    return [
        *table(["steps of c-teacher", PRIMARY, "psnr, dB"], rows),
        f"![quality against decode steps](steps-{preset}.png)",
        "",
        "Quality against the time of a decode; times from `tokbench speed`, which measures the networks in turns:",
        "",
        f"![quality against decode time](quality-time-{preset}.png)",
        "",
    ]


def front_section(results: dict[str, EvalResult], tables: dict, seeds: list[int], folder: Path) -> list[str]:
    """One seed of (a) and (c) on an encoder that SSDD trained: does the encoder's origin matter?"""
    seed, main, front = seeds[0], read_training(folder, "encoder"), read_training(folder, "front/encoder")
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
        f"One training seed ({seed}), exploratory. The encoder learnt with an SSDD decoder on {front['images_seen']:,}"
        f" crops, that of all other arms with a convolutional one on {main.get('images_joint', main['images_seen']):,}."
        " So they differ in training time as well as in origin: only arms on one encoder can be compared.",
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


def limits(results: dict[str, EvalResult], tables: dict, seeds: list[int], preset: str) -> list[str]:
    """What this cannot say."""
    planned = {
        metric: [contrast(tables, seeds, arm, base, metric) for arm, base in CONTRASTS] for metric in (PRIMARY, "psnr")
    }
    widths = {metric: np.mean([(c.high - c.low) / 2 for c in found]) for metric, found in planned.items()}
    infos = [results[f"{arm}-{seeds[0]}"] for arm in ARMS]
    sizes = sorted(info.tokenizer.decoder_params / 1e6 for info in infos)
    trained_on = infos[0].tokenizer.trained_on.rpartition(", ")[2]
    return [
        f"- {len(seeds)} training seeds: the bootstrap then underestimates the spread between trainings, so intervals"
        " and p are too narrow where trainings differ much; hence the rule that all seeds agree.",
        f"- {infos[0].dataset.num_images} test photographs: the planned contrasts are known to about"
        f" ±{widths[PRIMARY]:.3f} {PRIMARY} and ±{widths['psnr']:.1f} dB.",
        f"- Decoders of {sizes[0]:.1f} to {sizes[-1]:.1f} million parameters, trained on {trained_on}:"
        " nothing here carries over by itself.",
        "- The encoder comes from KL-VAE training, which may favour the convolutional arms.",
        "- An arm of two parts (c-student, c-control) restarts learning rate and weight average for the second.",
        *(
            ["- A few minutes of training an arm: all are far from converged; how fast they learn is compared."]
            if preset == "cpu"
            else []
        ),
    ]


if __name__ == "__main__":
    main()
