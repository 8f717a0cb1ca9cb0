"""Run published rows with their files, and write down which of them work: `make verify MODELS=a,b`.

In: names of the table; out: a line each, and baselines/verified.csv, by which a file counts as verified. A row that was
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
from typing import Any

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError

from baselines.hub import KeysDiffer, file_hash, local_only
from baselines.published import PUBLISHED, VERIFIED, Published
from tokbench.errors import CellError, InputError, first_line
from tokbench.evaluation.evaluate import evaluate
from tokbench.records.files import write_whole
from tokbench.registry import create
from tokbench.report.reported import read_reported
from tokbench.runtime.terminal import bar, say

TABLE = Path(__file__).with_name("verified.csv")
REPORTED = Path(__file__).parents[1] / "results" / "reported.csv"
COLUMNS = ("name", "date", "psnr", "files", "weights")
SPREAD = {True: 1.0, False: 4.0}  # dB, on ImageNet as papers use it, and on others; wrong ranges are farther off
LEAST = 15.0  # dB, where no paper gives a number
WEIGHTS = (".safetensors", ".bin", ".jit", ".pt", ".pth")
# Those of whichever HTTP client the hub's library uses.
NETWORK_ERRORS: tuple[type[Exception], ...] = (OSError, *HfHubHTTPError.__bases__)


def size(row: Published) -> int:
    """Bytes that the hub says its files have; 0 where it is not asked or does not answer."""
    if not row.repo or local_only():
        return 0
    try:
        files = HfApi().model_info(row.repo, files_metadata=True).siblings or []
    except NETWORK_ERRORS:
        return 0
    named = [file for file in files if file.rfilename == row.file]
    if row.subfolder or not named:
        below = f"{row.subfolder}/" if row.subfolder else ""
        named += [file for file in files if file.rfilename.startswith(below) and file.rfilename.endswith(WEIGHTS)]
    return sum(file.size or 0 for file in named)


def expected(name: str, resolution: int) -> list[float]:
    """PSNR on ImageNet's validation images that papers give for a row at its resolution."""
    rows = read_reported(REPORTED) if REPORTED.is_file() else []
    return [
        psnr
        for row in rows
        if row.tokenizer == name and row.numbers["resolution"] == resolution and row.dataset == "ImageNet-1k val"
        if (psnr := row.numbers["psnr"]) is not None
    ]


def judge(psnr: float, papers: Iterable[float], spread: float) -> tuple[bool, str]:
    """Whether a row's PSNR is right, and what to say of it."""
    papers = list(papers)
    if not papers:
        right = psnr > LEAST
        return right, "no paper's PSNR to compare with" if right else f"range wrong: below {LEAST:g} dB"
    printed = ", ".join(f"{paper:.2f}" for paper in papers)
    if min(papers) - spread <= psnr <= max(papers) + spread:
        return True, f"PSNR as printed ({printed} dB) within {spread:g} dB"
    return False, f"range wrong: papers give {printed} dB on ImageNet"


def run(name: str, data: str) -> tuple[str, dict[str, str] | None]:
    """What to say about a row, and its line of the table if it works: on the photographs, and on `data` if given."""
    resolution = PUBLISHED[name].resolution or 256
    said, right, line = ["loads"], True, {"name": name, "date": datetime.date.today().isoformat()}
    try:
        # A decoder alone is run behind the encoder of its latent space.
        tokenizer: Any = create(f"flux2-vae+{name}" if PUBLISHED[name].kind == "capacitor" else name)
        for images in dict.fromkeys(("samples", data)):
            result = evaluate(tokenizer, images, resolution, ("psnr",))
            value = result.metrics["psnr"].value
            if value is None:
                return result.metrics["psnr"].note, None
            imagenet = images.startswith("imagenet:")
            good, verdict = judge(value, expected(name, resolution), SPREAD[imagenet])
            said.append(f"{images} at {resolution} px {value:.2f} dB: {verdict}")
            right = right and good
            if images == "samples":
                line |= {"psnr": f"{value:.2f}", "weights": result.tokenizer.weights or ""}
    except KeysDiffer as error:
        return f"keys differ: {first_line(error)}", None
    except (CellError, InputError) as error:
        return first_line(error), None
    line["files"] = " ".join(map(file_hash, getattr(tokenizer, "decoding", tokenizer).files))
    return "; ".join(said), line if right else None


def write_table(lines: Mapping[str, Mapping[str, str]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines[name] for name in PUBLISHED if name in lines)
    write_whole(TABLE, text.getvalue().encode())


def free_space() -> int:
    """Bytes free where the hub's files go."""
    return shutil.disk_usage(next(p for p in Path(constants.HF_HUB_CACHE).parents if p.exists())).free


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make verify", description="Run published tokenizers with their files.")
    parser.add_argument("--models", default="", help="names, separated by commas; all if not given")
    parser.add_argument("--data", default="samples", help="further images, as for `tokbench run`, e.g. imagenet:ROOT")
    parser.add_argument("--max-size", type=float, default=float("inf"), help="leave out rows of more gigabytes")
    parser.add_argument("--again", action="store_true", help="also those that are verified already")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Status 1 if a row does not work, 2 for an unknown name."""
    options = options_of(arguments)
    names = [name for name in options.models.split(",") if name] or list(PUBLISHED)
    if unknown := [name for name in names if name not in PUBLISHED]:
        print(f"verify: no published row is called {', '.join(unknown)}; see `tokbench list models`", file=sys.stderr)
        return 2
    lines = dict(VERIFIED)
    todo = [name for name in names if options.again or name not in lines]
    sizes: dict[str, int] = {}
    with bar("asking the hub for sizes", len(todo), "rows") as advance:
        for name in todo:
            sizes[name] = size(PUBLISHED[name])
            advance(1)
    todo = [name for name in todo if sizes[name] <= options.max_size * 1e9]
    space = f"{sum(sizes[name] for name in todo) / 1e9:.1f} GB by the hub, {free_space() / 1e9:.1f} GB free"
    print(f"{len(todo)} rows, {space}; {len(names) - len(todo)} left out", flush=True)
    works = 0
    for i, name in enumerate(todo, 1):
        say(f"[{i}/{len(todo)}] {name}: {sizes[name] / 1e9:.2f} GB")
        if sizes[name] > free_space():
            said, line = "does not fit on the disk", None
        else:
            said, line = run(name, options.data)
        print(f"[{i}/{len(todo)}] {name}: {said}", flush=True)
        if line is not None:
            works += 1
            lines[name] = line
            write_table(lines)
    print(f"{works} of {len(todo)} work; {len(lines)} of {len(PUBLISHED)} rows are verified")
    return int(works < len(todo))


if __name__ == "__main__":
    sys.exit(main())
