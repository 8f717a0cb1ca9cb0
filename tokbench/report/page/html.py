"""The page: one file that opens from disk. Everything from files reaches it as JSON and is set as text."""

import base64
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np

from tokbench.records.files import image_folders, write_whole
from tokbench.report.columns import ResultEntry, compression, metric_column
from tokbench.report.leaderboard import UNRANKED_FAMILIES, Block
from tokbench.report.tables import Table, for_page

PICTURE_BYTES = 8_000_000  # of all pictures: the page stays under 15 MB
DRAWN = 300  # images of a set whose values are drawn one by one
EXTREMES = 5  # worst and best images that are named

Pictures = dict[str, dict[str, Path]]  # by row, "" the originals, and sample


def write_page(measured: Sequence[Block], more: Sequence[Table], out: Path, changes: Table | None = None) -> Path:
    """Write the page, `out` or index.html below that folder, and return its path. InputError where it cannot be.

    Pictures that were saved beside the records are put into it as far as PICTURE_BYTES go, those of the block with
    most rows first. `changes` are shown above `more`.
    """
    views = [_block(block) for block in measured]
    left = PICTURE_BYTES
    for view, block in sorted(zip(views, measured, strict=True), key=lambda pair: -len(pair[1].rows)):
        view["images"], left = _images(block, left)
    page = resources.files("tokbench.report.page")
    text = (page / "page.html").read_text(encoding="utf-8")
    for name in ("page.css", "page.js"):
        text = text.replace(f"/*{name}*/", (page / name).read_text(encoding="utf-8"))
    data = {
        "blocks": views,
        "changes": for_page(changes) if changes else None,
        "more": [for_page(table) for table in more],
        "figures": [figure for block in measured for figure in _figures(block)],
    }
    target = out if out.suffix == ".html" else out / "index.html"
    write_whole(target, text.replace("/*data*/", script_json(data)))
    return target


def script_json(value: object) -> str:
    """JSON that is safe inside a script element: no "<", so no end tag and no comment."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _block(block: Block) -> dict[str, Any]:
    """A block's table, with what only tokenizers have: families for colours, facts shown on hover, values by image."""
    record = for_page(block)
    for row in record["rows"]:
        entry = block.entries[row["name"]]
        info = entry.result.tokenizer
        ranked = info.family not in UNRANKED_FAMILIES
        row |= {"family": info.family, "ranked": ranked, "latent": compression(info), "facts": provenance(entry)}
    return record


def _figures(block: Block) -> list[dict[str, str]]:
    """The curves of a block that was probed, the spectra of one of latents: name and source."""
    entries = list(block.entries.values())
    made: list[Path | None] = []  # matplotlib takes half a second that other pages can spare
    with tempfile.TemporaryDirectory() as folder:
        if any("@" in metric for entry in entries for metric in entry.result.metrics):
            from tokbench.report.probes.plots import probe_plots

            made += probe_plots(entries, Path(folder), "page.svg")
        if any(entry.result.latents for entry in entries):
            from tokbench.report.curves import latent_spectra

            made.append(latent_spectra(entries, Path(folder) / "spectra-page.svg"))
        return [{"name": f"{path.stem.removesuffix('-page')}, {block.title}", "source": embedded(path, "svg+xml")}
                for path in made if path is not None]  # fmt: skip


def embedded(path: Path, kind: str) -> str:
    """An image file as a URL that holds it."""
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def provenance(entry: ResultEntry) -> list[tuple[str, str]]:
    """What is shown about a row on hover: where the model and the number come from."""
    result, info, origin = entry.result, entry.result.tokenizer, entry.result.provenance
    commit = (origin.commit or "")[:12] + (" (changed)" if origin.dirty else "")
    settings = {"spec": result.settings.spec, "dtype": result.settings.dtype, "seeds": result.settings.seeds}
    facts = {
        "compression": compression(info),
        "parameters": f"{info.encoder_params / 1e6:.1f} M + {info.decoder_params / 1e6:.1f} M",
        "trained on": info.trained_on,
        "losses": ", ".join(info.losses),
        "licence": info.licence,
        "paper": info.paper,
        "note": info.note,
        "weights": (info.weights or "")[:16],
        "date": origin.date,
        "device": origin.device,
        "commit": commit,
        "command": origin.command,
        "settings": ", ".join(f"{k} {v}" for k, v in settings.items()),
        "versions": ", ".join(f"{k} {v}" for k, v in origin.versions.items()),
    }
    return [(name, text) for name, text in facts.items() if text.strip()]


def _images(block: Block, room: int) -> tuple[dict[str, Any] | None, int]:
    """What is shown image by image, and the bytes of `room` that are left; None where nothing is known of any image.

    `ids` are the samples that are shown; `pictures` sources by row ("" the originals) and index of the id; `rows`
    values by row and metric; `extremes` by row and metric the worst and the best of all `count` images.
    """
    entries = [block.entries[row.name] for row in block.rows]
    saved = _saved(entries)
    pictured, room = _affordable(saved, room)
    known = sorted({sample for entry in entries for sample in entry.rows[0]})
    step = -(-len(known) // DRAWN) or 1
    ids = sorted({*pictured, *known[::step]})
    if not ids:
        return None, room
    place = {sample: index for index, sample in enumerate(ids)}
    pictures = {
        name: {place[sample]: embedded(path, "png") for sample, path in of.items() if sample in pictured}
        for name, of in saved.items()
    }
    rows = {entry.name: _values(entry, ids) for entry in entries if entry.rows[0]}
    better = {name: metric_column(name).better for columns in rows.values() for name in columns}
    shown = {
        "ids": ids,
        "count": max(len(known), len(ids)),
        "pictures": {name: of for name, of in pictures.items() if of},
        "left_out": len(set().union(*saved.values()) - pictured) if saved else 0,
        "metrics": [{"key": name, "better": better[name]} for name in sorted(better)],
        "rows": rows,
        "extremes": {entry.name: _extremes(entry, better) for entry in entries if entry.rows[0]},
    }
    return shown, room


def _saved(entries: Sequence[ResultEntry]) -> Pictures:
    """The saved images of rows, and "" the originals, where both are there."""
    saved: Pictures = {}
    for entry in entries:
        if entry.path is not None:
            real, fake = image_folders(entry.path)
            fakes = {unquote(path.stem): path for path in sorted(fake.glob("*.png")) if (real / path.name).exists()}
            if fakes:
                saved[entry.name] = fakes
                saved.setdefault("", {}).update({sample: real / path.name for sample, path in fakes.items()})
    return saved


def _affordable(saved: Pictures, room: int) -> tuple[set[str], int]:
    """The first samples whose pictures fit into `room` bytes, those that most rows have before others; what is left."""
    chosen = set()
    samples = sorted(saved.get("", ()), key=lambda sample: (-sum(sample in of for of in saved.values()), sample))
    for sample in samples:
        size = sum(of[sample].stat().st_size for of in saved.values() if sample in of)
        if size > room:
            break
        chosen.add(sample)
        room -= size
    return chosen, room


def _values(entry: ResultEntry, ids: Sequence[str]) -> dict[str, list[float | None]]:
    """Per-image columns by the order of `ids`, five digits."""
    samples, columns = entry.rows
    place = {sample: index for index, sample in enumerate(samples)}
    at = [place.get(sample) for sample in ids]
    return {name: [None if i is None else _rounded(x[i]) for i in at] for name, x in columns.items()}


def _extremes(entry: ResultEntry, better: Mapping[str, str]) -> dict[str, list[list[tuple[str, float | None]]]]:
    """By metric the worst and the best images and their values, each from the outside in."""
    samples, columns = entry.rows
    found = {}
    for name, values in columns.items():
        order = np.argsort(values if better[name] == "higher" else -values, kind="stable")
        order = order[np.isfinite(values[order])]
        ends = (order[:EXTREMES], order[::-1][:EXTREMES])
        found[name] = [[(samples[i], _rounded(values[i])) for i in end] for end in ends]
    return found


def _rounded(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None
