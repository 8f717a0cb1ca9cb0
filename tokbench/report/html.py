"""The page: a static folder that opens from disk. Everything from files reaches it as JSON and is set as text."""

import json
import math
import shutil
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from tokbench.records.files import image_folders, per_image_path, writable, write_whole
from tokbench.report.columns import ResultEntry, compression, metric_column
from tokbench.report.leaderboard import UNRANKED_FAMILIES, Block
from tokbench.report.tables import Table, for_page


def write_page(measured: Sequence[Block], more: Sequence[Table], out: Path) -> Path:
    """Write the site below `out` and return its index.html. InputError where it cannot be written.

    The first view (tables, scatter) is in index.html; per-image rows (rows/N.js) and images are loaded when looked at.
    """
    views = [_block(block, number, out) for number, block in enumerate(measured)]
    page = resources.files("tokbench.report") / "page"
    text = (page / "page.html").read_text(encoding="utf-8")
    for name in ("page.css", "page.js"):
        text = text.replace(f"/*{name}*/", (page / name).read_text(encoding="utf-8"))
    figures = [path.relative_to(out).as_posix() for n, block in enumerate(measured) for path in _figures(block, n, out)]
    data = script_json({"blocks": views, "more": [for_page(table) for table in more], "figures": figures})
    write_whole(out / "index.html", text.replace("/*data*/", data))
    return out / "index.html"


def script_json(value: object) -> str:
    """JSON that is safe inside a script element: no "<", so no end tag and no comment."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _block(block: Block, number: int, out: Path) -> dict[str, Any]:
    """A block's table, with what only tokenizers have: families for colours, facts shown on hover, pictures."""
    record = for_page(block)
    for row in record["rows"]:
        entry = block.entries[row["name"]]
        info = entry.result.tokenizer
        ranked = info.family not in UNRANKED_FAMILIES
        row |= {"family": info.family, "ranked": ranked, "latent": compression(info), "facts": provenance(entry)}
    return record | {"images": _images(block, number, out)}


def _figures(block: Block, number: int, out: Path) -> list[Path]:
    """The curves of a block that was probed, the spectra of one of latents."""
    entries, made = list(block.entries.values()), []  # matplotlib takes half a second that other pages can spare
    if any("@" in metric for entry in entries for metric in entry.result.metrics):
        from tokbench.report.probes.plots import probe_plots

        made += probe_plots(entries, out / "plots", f"{number}.svg")
    if any(entry.result.latents for entry in entries):
        from tokbench.report.curves import latent_spectra

        made.append(latent_spectra(entries, out / "plots" / f"spectra-{number}.svg"))
    return [path for path in made if path is not None]


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


def _images(block: Block, number: int, out: Path) -> dict[str, Any] | None:
    """Copy the saved images of a block, write its per-image rows, and say what there is; None without images."""
    entries = [block.entries[row.name] for row in block.rows]
    folders = {e.name: image_folders(e.path) for e in entries if e.path is not None}
    folders = {name: pair for name, pair in folders.items() if all(folder.is_dir() for folder in pair)}
    real = next((real for real, _ in folders.values()), None)
    if real is None:
        return None
    ids = sorted(unquote(path.stem) for path in real.glob("*.png"))
    place = {sample: index for index, sample in enumerate(ids)}
    _copy(real, out / "images" / str(number) / "real", place)
    models: dict[str, dict[str, Any]] = {}
    for index, (name, (_, folder)) in enumerate(folders.items()):
        have = _copy(folder, out / "images" / str(number) / str(index), place)
        models[name] = {"folder": str(index), "have": have}
    rows = {e.name: _values(e, ids) for e in entries if e.name in models and e.path and per_image_path(e.path).exists()}
    metrics = sorted({key for columns in rows.values() for key in columns})
    content = script_json({"block": number, "rows": rows})
    write_whole(out / "rows" / f"{number}.js", f"tokbenchRows({content});\n")
    return {"ids": ids, "models": models, "metrics": [{"key": m, "better": metric_column(m).better} for m in metrics]}


def _copy(source: Path, target: Path, place: dict[str, int]) -> list[int]:
    """Copy images that changed to short names, by index of their id; the sorted indices that are there."""
    have = []
    with writable(target):
        target.mkdir(parents=True, exist_ok=True)
        for path in source.glob("*.png"):
            index = place.get(unquote(path.stem))
            if index is None:
                continue
            have.append(index)
            to, stat = target / f"{index}.png", path.stat()
            if not to.exists() or (to.stat().st_size, to.stat().st_mtime_ns) != (stat.st_size, stat.st_mtime_ns):
                shutil.copy2(path, to)
    return sorted(have)


def _values(entry: ResultEntry, ids: Sequence[str]) -> dict[str, list[float | None]]:
    """Per-image columns by the order of `ids`, five digits."""
    samples, columns = entry.rows
    place = {sample: index for index, sample in enumerate(samples)}
    at = [place.get(sample) for sample in ids]

    def rounded(value: float) -> float | None:
        return float(f"{value:.5g}") if math.isfinite(value) else None

    return {name: [None if i is None else rounded(float(x[i])) for i in at] for name, x in columns.items()}
