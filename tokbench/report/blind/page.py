"""`tokbench report --blind N`: a page of real images, each with two reconstructions that it does not name."""

import hashlib
import itertools
import json
import random
import secrets
import shutil
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from tokbench.errors import InputError, unreadable
from tokbench.records.files import image_folders, writable, write_whole
from tokbench.report.columns import ResultEntry
from tokbench.report.leaderboard import blocks
from tokbench.report.page.html import script_json

FORMAT = "tokbench-votes-1"


def code_of(salt: str, name: str) -> str:
    """What a page calls a model: nobody reads its name there, and who has the results finds it again."""
    return hashlib.sha256(f"{salt}/{name}".encode()).hexdigest()[:16]


def write_blind_page(entries: Sequence[ResultEntry], count: int, out: Path) -> Path:
    """Write `count` comparisons below `out` and return its blind.html.

    Pairs of models come in turns, images and sides at random. InputError without two models whose images are saved.
    """
    if count < 1:
        raise InputError(f"--blind {count}: needs at least one comparison")
    images = saved_images(entries)
    salt = secrets.token_hex(8)
    drawn = random.Random(salt)
    pairs = list(itertools.combinations(sorted(images), 2))
    drawn.shuffle(pairs)
    folder = out / "blind"
    with writable(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    comparisons = []
    for pair, _ in zip(itertools.cycle(pairs), range(count), strict=False):
        sides = drawn.sample(pair, 2)
        sample = drawn.choice(sorted(images[pair[0]].keys() & images[pair[1]].keys()))
        real = images[pair[0]][sample][0]
        places = [_copied(path, folder) for path in (real, *(images[name][sample][1] for name in sides))]
        comparisons.append({"images": places, "sample": sample, "codes": [code_of(salt, name) for name in sides]})
    drawn.shuffle(comparisons)
    text = (resources.files("tokbench.report.blind") / "page.html").read_text(encoding="utf-8")
    data = script_json({"format": FORMAT, "salt": salt, "comparisons": comparisons})
    write_whole(out / "blind.html", text.replace("/*data*/", data))
    return out / "blind.html"


def saved_images(entries: Sequence[ResultEntry]) -> dict[str, dict[str, tuple[Path, Path]]]:
    """By model and sample, the saved image and reconstruction; of the block where most models have some."""
    best: dict[str, dict[str, tuple[Path, Path]]] = {}
    for block in blocks(entries, ["psnr"], group=False):
        found = {}
        for name, entry in block.entries.items():
            if entry.path is not None:
                real, fake = image_folders(entry.path)
                paths = {unquote(path.stem): (real / path.name, path) for path in fake.glob("*.png")}
                found[name] = {sample: pair for sample, pair in paths.items() if pair[0].exists()}
        found = {name: pairs for name, pairs in found.items() if pairs}
        if len(found) > len(best):
            best = found
    for a, b in itertools.combinations(best, 2):
        if not best[a].keys() & best[b].keys():
            raise InputError(f"--blind: {a} and {b} have no saved image in common; measure both with --save-images N")
    if len(best) < 2:
        raise InputError("--blind: needs saved images of two models on the same data; `tokbench run --save-images N`")
    return best


def _copied(path: Path, folder: Path) -> str:
    """A copy under a name that says nothing, and where it is."""
    content = path.read_bytes()
    target = folder / f"{hashlib.sha256(content).hexdigest()[:24]}.png"
    write_whole(target, content)
    return f"blind/{target.name}"


def read_votes(path: Path) -> dict[str, Any]:
    """What a page has exported; InputError for anything else."""
    try:
        votes = json.loads(path.read_text(encoding="utf-8"))
        if votes["format"] != FORMAT or not isinstance(votes["salt"], str):
            raise ValueError("of another format")
        for vote in votes["votes"]:
            if len(vote["codes"]) != 2 or vote["choice"] not in ("first", "second", "tie"):
                raise ValueError(f"no vote: {vote}")
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise InputError(unreadable(path, "file of votes, of a page of `tokbench report --blind`", error)) from error
    return dict(votes)
