"""Image sources by name, and what is in them."""

import codecs
import os
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokbench import registry
from tokbench.data.archives import list_tar, list_zip
from tokbench.data.named import SETS, check_set, require_set
from tokbench.data.sources import (
    FileSource,
    HuggingFaceSource,
    ShardSource,
    Source,
    TarSource,
    ZipSource,
    list_folder,
    sample_id,
    unique_ids,
)
from tokbench.errors import InputError, first_line, unreadable
from tokbench.records.files import slug
from tokbench.weights.files import offline

SAMPLES = Path(__file__).parents[1] / "samples"
ARCHIVES = (".tar", ".zip")
IMAGENET = {  # where each split lies, as shipped, as Kaggle unpacks it, or unpacked by hand
    "val": ("val", "ILSVRC2012_img_val", "ILSVRC/Data/CLS-LOC/val", "ILSVRC2012_img_val.tar"),
    "train": ("train", "ILSVRC2012_img_train", "ILSVRC/Data/CLS-LOC/train", "ILSVRC2012_img_train.tar"),
}
IMAGENET_IMAGES = {"val": 50_000, "train": 1_281_167}


def open_source(spec: str | Path, split: str | None = None, limit: int | None = None) -> Source:
    """`samples`, `imagenet:ROOT`, `folder:DIR`, `tar:FILE` (or zip), `list:FILE`, `hf:NAME[#COLUMN]`, or a path.

    Also the names of `tokbench data list` and, as `NAME` or `NAME:REST`, those that plugins registered; a path that
    exists comes before them. InputError if there is nothing there, or no image in it, or two images share an id.
    """
    text = os.fspath(spec)
    kind, colon, rest = text.partition(":")
    if text == "samples" or (colon and kind in OPENERS):
        source = OPENERS[kind](rest, split)
    elif Path(text).exists():
        source = _guess(Path(text), split)
    elif text in SETS:
        source = _named(text, split)
    elif kind in (registered := registry.SOURCES.all()):
        source = registered[kind].open(rest, split)
    else:
        raise InputError(f"{text}: no such file or folder; --data takes a path or one of {', '.join(_names())}")
    if not source.ids:
        raise InputError(f"{text}: no images in it ({', '.join(source.problems) or 'of a type that is read here'})")
    if limit is not None:
        source.limit(limit)
    return source


def _guess(path: Path, split: str | None) -> Source:
    name = path.name.lower()
    if path.is_dir():
        parquet = next(path.glob("*.parquet"), None)
        return _hugging_face(str(path), split) if parquet else _folder(str(path), split)
    if name.endswith(ARCHIVES):
        return _archive(str(path), split)
    if name.endswith(".parquet"):
        return _hugging_face(str(path), split)
    if name.endswith((".txt", ".lst")):
        return _list(str(path), split)
    raise InputError(f"{path}: not a folder, {', '.join(ARCHIVES)}, .parquet, or .txt list of paths")


def _no_split(name: str, split: str | None) -> None:
    if split is not None:
        raise InputError(f"{name}: has no splits; leave --split {split} out")


def _names() -> list[str]:
    return [*OPENERS, *SETS, *registry.SOURCES.all()]


def _named(name: str, split: str | None) -> Source:
    _no_split(name, split)
    folder = require_set(name)
    source = _imagenet(str(folder), None) if name == "imagenet-val" else _files(name, None, folder)
    if source.name == name:
        check_set(source)
    return source


def _samples(rest: str, split: str | None) -> Source:
    _no_split("samples", split)
    return _files("samples", None, SAMPLES)


def _files(name: str, split: str | None, root: Path, to_id: Callable[[str], str] = sample_id) -> Source:
    """Images of a folder and those below it; or of its tars, if it holds nothing else."""
    names, problems = list_folder(root)
    tars = [] if names else sorted(root.glob("*.tar"))
    if not tars:
        return FileSource(name, split, root, unique_ids(names, root, to_id), names, problems)
    listed = [(tar.name, *list_tar(tar)) for tar in tars]
    entries = [(tar, member) for tar, members, _ in listed for member in members]
    ids = unique_ids([member.name for _, member in entries], root, to_id)
    return ShardSource(name, split, root, ids, entries, [problem for _, _, found in listed for problem in found])


def _folder(root: str, split: str | None) -> Source:
    folder = Path(root)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    name = slug(folder.resolve().name)
    if split is not None:
        if not (folder / split).is_dir():
            raise InputError(f"{folder}: has no split {split!r}")
        return _files(f"{name}-{slug(split)}", split, folder / split)
    if (folder / "train").is_dir() and (folder / "val").is_dir():
        raise InputError(f"{folder}: holds train and val; choose one with --split")
    return _files(name, None, folder)


def _archive(file: str, split: str | None) -> Source:
    path = Path(file)
    _no_split(file, split)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    return _archived(slug(path.stem), None, path, sample_id)


def _archived(name: str, split: str | None, path: Path, to_id: Callable[[str], str]) -> Source:
    if zipfile.is_zipfile(path):
        names, problems = list_zip(path)
        return ZipSource(name, split, path, unique_ids(names, path, to_id), names, problems)
    members, problems = list_tar(path)
    return TarSource(name, split, path, unique_ids([member.name for member in members], path, to_id), members, problems)


def _list(file: str, split: str | None) -> Source:
    """Paths, one a line, absolute or relative to the list's folder; ids are the paths as written."""
    path = Path(file)
    _no_split(file, split)
    try:
        text = os.fsdecode(path.read_bytes().removeprefix(codecs.BOM_UTF8))
        names = [line for line in text.replace("\r\n", "\n").split("\n") if line.strip()]
    except OSError as error:
        raise InputError(unreadable(path, "list of paths", error)) from error
    if "\0" in text:
        raise InputError(f"{path}: not a list of paths; --data takes a folder, an archive or a list")
    names.sort()
    return FileSource(slug(path.stem), None, path.parent, unique_ids(names, path), names)


def _imagenet(root: str, split: str | None) -> Source:
    """ILSVRC 2012; every layout gives the same ids (the files' stems), hence the same fingerprint."""
    folder, split = Path(root), {"validation": "val", None: "val"}.get(split, split)
    if split not in IMAGENET:
        raise InputError(f"imagenet: has no split {split!r}; choose val or train")
    found = next((folder / place for place in IMAGENET[split] if (folder / place).exists()), folder)
    if not found.exists():
        raise InputError(f"{folder}: no such folder; it should hold {' or '.join(IMAGENET[split])}")
    name = "imagenet" if split == "val" else f"imagenet-{split}"
    if found.is_file():
        source = _archived(name, split, found, _stem)
    else:
        if any((found / other).is_dir() for other in IMAGENET):
            raise InputError(f"{folder}: holds no {' or '.join(IMAGENET[split])}")
        source = _files(name, split, found, _stem)
    source.sort()
    if len(source) != IMAGENET_IMAGES[split]:
        source.problems.append(f"{len(source)} images; ImageNet's {split} split has {IMAGENET_IMAGES[split]}")
    return source


def _stem(name: str) -> str:
    return sample_id(name).rpartition("/")[2]


def _hugging_face(name: str, split: str | None) -> Source:
    """OWNER/NAME[:CONFIG][@REVISION] from the hub, or parquet files on this machine."""
    if offline():
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    try:
        import datasets
    except ImportError as error:
        raise InputError("hf: needs the package `datasets`; pip install 'tokbench[hf]'") from error
    name, _, asked = name.partition("#")
    local = Path(name)
    split = split or ("train" if local.exists() else "validation")
    try:
        if local.exists():
            files = sorted(str(path) for path in local.glob("*.parquet")) if local.is_dir() else [str(local)]
            rows = datasets.load_dataset("parquet", data_files={split: files}, split=split)
            label = slug(local.resolve().stem)
        else:
            repository, _, revision = name.partition("@")
            repository, _, config = repository.partition(":")
            rows = datasets.load_dataset(repository, config or None, split=split, revision=revision or None)
            label = slug(name)
    except (OSError, ValueError, ImportError) as error:
        reason = first_line(error)
        raise InputError(f"hf:{name}: split {split!r} cannot be loaded ({reason})") from error
    column = _image_column(rows, datasets, name, asked)
    if isinstance(rows.features[column], datasets.Image):
        rows = rows.cast_column(column, datasets.Image(decode=False))
    return HuggingFaceSource(f"{label}-{slug(split)}", split, rows, column)


def _image_column(rows: Any, datasets: Any, name: str, asked: str) -> str:
    """The column of that name, or the only one of images, or the one called image."""
    columns = [
        column
        for column, feature in rows.features.items()
        if isinstance(feature, datasets.Image) or (isinstance(feature, dict) and {"bytes", "path"} <= feature.keys())
    ]
    if not columns or (asked and asked not in columns):
        raise InputError(f"hf:{name}: no column {asked or 'of images'} among {', '.join(rows.features)}")
    if asked or len(columns) == 1:
        return asked or columns[0]
    if "image" not in columns:
        raise InputError(f"hf:{name}: images in the columns {', '.join(columns)}; choose one, hf:{name}#{columns[0]}")
    return "image"


OPENERS: dict[str, Callable[[str, str | None], Source]] = {
    "samples": _samples, "imagenet": _imagenet, "folder": _folder, "tar": _archive, "list": _list,
    "hf": _hugging_face,
}  # fmt: skip


def describe(source: Source, *, decode: bool = False) -> list[str]:
    """Lines for `tokbench data info`: what a run would see. `decode` reads every image to its end to find damage."""
    facts = source.facts()
    problems = [*source.problems, *(fact.problem for fact in facts if fact.problem)]
    if decode:
        problems += [reason for reason in (_damage(source, i) for i, f in enumerate(facts) if not f.problem) if reason]
    sizes = sorted((fact.width, fact.height) for fact in facts if not fact.problem)
    by_area = sorted(sizes, key=lambda size: size[0] * size[1])
    lines = [f"name         {source.name}" + (f" (split {source.split})" if source.split else "")]
    lines.append(f"images       {len(source)}")
    if sizes:
        small, middle, large = (f"{w}x{h}" for w, h in (by_area[0], by_area[len(by_area) // 2], by_area[-1]))
        lines.append(f"sizes        {small} to {large}, median {middle}")
        below = {res: sum(min(size) < res for size in sizes) for res in (128, 256, 512, 1024)}
        lines.append("too small    " + ", ".join(f"{count} for {res} px" for res, count in below.items()))
    if turned := sum(fact.orientation != 1 for fact in facts):
        count = "1 image says" if turned == 1 else f"{turned} images say"
        lines.append(f"orientation  {count} to be turned, which the protocols ignore as their references do")
    for title, names in (("formats", [f.format for f in facts]), ("modes", [f.mode for f in facts])):
        counts = Counter(name for name in names if name).most_common()
        lines.append(f"{title:<13}" + ", ".join(f"{name} {count}" for name, count in counts))
    lines.append(f"fingerprint  {source.fingerprint()}")
    lines.append(
        f"problems     {len(problems) or 'none' if decode or problems else 'none found (--decode looks closer)'}"
    )
    return lines + [f"  {problem}" for problem in problems]


def _damage(source: Source, index: int) -> str:
    try:
        source.load(index)
    except InputError as error:
        return str(error)
    return ""
