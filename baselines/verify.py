"""Run published rows with their files, and write down which of them work: `make verify MODELS=a,b`.

In: names of the table; out: a line each, and baselines/verified.csv, by which a row counts as verified. A row that was
run is not run again, one that fails does not stop the others, and the table is written after each.
"""

import argparse
import csv
import datetime
import io
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError

from baselines.hub import local_only
from baselines.published import PUBLISHED, VERIFIED, Published
from tokbench.errors import CellError, InputError, first_line
from tokbench.evaluation.evaluate import evaluate
from tokbench.records.files import write_whole
from tokbench.report.reported import read_reported

TABLE = Path(__file__).with_name("verified.csv")
REPORTED = Path(__file__).parents[1] / "results" / "reported.csv"
COLUMNS = ("name", "date", "psnr", "weights")
SPREAD = 4.0  # dB: the photographs are not the paper's images; a wrong scale, range or key order is farther off
# Those of whichever HTTP client the hub's library uses.
NETWORK_ERRORS: tuple[type[Exception], ...] = (OSError, *HfHubHTTPError.__bases__)
LEAST = 15.0  # dB, where no paper gives a number


def size(row: Published) -> int | None:
    """Bytes that the hub says its files have; None where it is not asked or does not answer."""
    if not row.repo or local_only():
        return None
    try:
        files = HfApi().model_info(row.repo, files_metadata=True).siblings or []
    except NETWORK_ERRORS:
        return None
    below = f"{row.subfolder}/" if row.subfolder else ""
    wanted = (".safetensors", ".bin", ".jit")
    named = [f for f in files if f.rfilename == row.file] or [
        f for f in files if f.rfilename.startswith(below) and f.rfilename.endswith(wanted)
    ]
    return sum(f.size or 0 for f in named) or None


def expected(name: str, resolution: int) -> list[float]:
    """PSNR on ImageNet's validation images that papers give for a row at its resolution."""
    rows = read_reported(REPORTED) if REPORTED.is_file() else []
    return [
        psnr
        for row in rows
        if row.tokenizer == name and row.numbers["resolution"] == resolution and row.dataset == "ImageNet-1k val"
        if (psnr := row.numbers["psnr"]) is not None
    ]


def judge(psnr: float, papers: Iterable[float]) -> str:
    """ "" for a row that works, else what is wrong with its PSNR."""
    papers = list(papers)
    if not papers:
        return "" if psnr > LEAST else f"below {LEAST:g} dB: its range, scale or weights are wrong"
    if min(papers) - SPREAD <= psnr <= max(papers) + SPREAD:
        return ""
    return f"papers give {', '.join(f'{paper:.2f}' for paper in papers)} dB on ImageNet: its range or scale is wrong"


def run(name: str, data: str) -> tuple[str, dict[str, str] | None]:
    """What to say about a row, and its line of the table if it works."""
    resolution = PUBLISHED[name].resolution or 256
    try:
        result = evaluate(name, data, resolution, ("psnr",))
    except (CellError, InputError) as error:
        return first_line(error), None
    value = result.metrics["psnr"].value
    if value is None:
        return result.metrics["psnr"].note, None
    papers = expected(name, resolution)
    if wrong := judge(value, papers):
        return f"{value:.2f} dB; {wrong}", None
    beside = f", within {SPREAD:g} dB of papers" if papers else ""
    weights = result.tokenizer.weights or ""
    line = {"name": name, "date": datetime.date.today().isoformat(), "psnr": f"{value:.2f}", "weights": weights}
    return f"loads, {value:.2f} dB at {resolution} px{beside}", line


def write_table(lines: Mapping[str, Mapping[str, str]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines[name] for name in PUBLISHED if name in lines)
    write_whole(TABLE, text.getvalue().encode())


def main(arguments: list[str] | None = None) -> int:
    """Status 1 if a row does not work, 2 for an unknown name."""
    parser = argparse.ArgumentParser(prog="make verify", description="Run published tokenizers with their files.")
    parser.add_argument("--models", default="", help="names, separated by commas; all if not given")
    parser.add_argument(
        "--data", default="samples", help="images as for `tokbench run`; samples alone are written down"
    )
    parser.add_argument("--max-size", type=float, default=float("inf"), help="leave out rows of more gigabytes")
    parser.add_argument("--again", action="store_true", help="also those that are verified already")
    options = parser.parse_args(arguments)
    names = [name for name in options.models.split(",") if name] or list(PUBLISHED)
    if unknown := [name for name in names if name not in PUBLISHED]:
        print(f"verify: no published row is called {', '.join(unknown)}; see `tokbench list models`", file=sys.stderr)
        return 2
    lines = dict(VERIFIED)
    todo = [name for name in names if options.again or name not in lines or options.data != "samples"]
    sizes = {name: size(PUBLISHED[name]) for name in todo}
    todo = [name for name in todo if (sizes[name] or 0) <= options.max_size * 1e9]
    free = shutil.disk_usage(next(p for p in Path(constants.HF_HUB_CACHE).parents if p.exists())).free
    total = sum(sizes[name] or 0 for name in todo)
    space = f"{total / 1e9:.1f} GB by the hub, {free / 1e9:.1f} GB free"
    print(f"{len(todo)} rows, {space}; {len(names) - len(todo)} left out")
    failed = 0
    for i, name in enumerate(todo, 1):
        said, line = run(name, options.data)
        failed += line is None
        print(f"[{i}/{len(todo)}] {name}: {said}", flush=True)
        if line is not None and options.data == "samples":
            lines[name] = line
            write_table(lines)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
