"""Files of published models: from the hub, its cache or a folder, with errors that say what to do."""

import contextlib
import json
import re
import socket
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from huggingface_hub import constants, hf_hub_download, list_repo_files
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from baselines.published import Published
from tokbench.checkpoints import load_strictly
from tokbench.errors import FILE_ERRORS, CellError, InputError, first_line, preview
from tokbench.records.cache import cache_folder
from tokbench.weights.files import WeightsError, check_file, file_sha256, offline
from tokbench.weights.transfer import download

LOAD_ERRORS = (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError, UnpicklingError)
# Sets of weights that lie side by side in one file. Averages come first: authors evaluate those where they have them.
SETS = ("ema", "params_ema", "ema_state_dict", "model_ema_state_dict", "model_ema", "state_dict", "model", "params",
        "model_state_dict")  # fmt: skip
# What processes, compilers and latent diffusion put before the names of tensors.
WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod|first_stage_model)\.)+|(?<=\.)_orig_mod\.")
WEIGHTS = re.compile(r"diffusion_pytorch_model(\.(?P<variant>\w+))?(-\d+-of-\d+)?\.(?P<kind>safetensors|bin)")
REFUSED = "holds more than tensors: refused, for reading it would run its code; if you trust it, save it as safetensors"


class KeysDiffer(CellError):
    """A file's tensors are not those of the network, by name or shape."""


def load_model(source: str, subfolder: str, kind: str | None, name: str) -> tuple[Any, tuple[Path, ...]]:
    """A diffusers model in float32, from a hub repository or a local folder, and the files that its weights lie in.

    `kind` is the class that it must be.

    Raises CellError, one line: gated, missing or unreachable repository, wrong folder, another class, damaged or
    pickled weights (torch's weights_only reader is the only one used), weights that do not fill the model.
    """
    folder = subfolder or None
    if Path(source).is_dir():
        config_file = Path(source, subfolder, "config.json")
        if not config_file.is_file():
            raise CellError(f"{name}: {Path(source, subfolder)} has no config.json of a diffusers model")
    elif Path(source).is_file():
        raise CellError(f"{name}: {source} is a file; give a folder of diffusers, or write NAME:{source}")
    else:
        config_file = fetch(source, f"{subfolder}/config.json" if subfolder else "config.json", name)
    found = read_config(config_file, name).get("_class_name", "a model without _class_name")
    if kind is not None and found != kind:
        raise CellError(f"{name}: {source} holds {found}, expected {kind}")
    variant, safe = weights_of(names_in(source, subfolder, config_file))
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # of diffusers' own use of the hub
            model, report = model_class(name, found).from_pretrained(
                source, subfolder=folder, local_files_only=local_only(), output_loading_info=True,
                variant=variant or None, use_safetensors=safe,
            )  # fmt: skip
    except LOAD_ERRORS as error:
        chain: list[BaseException] = [error]
        while chain[-1].__context__ is not None:
            chain.append(chain[-1].__context__)
        if any(isinstance(link, UnpicklingError) for link in chain):
            raise CellError(f"{name}: {source} {REFUSED}") from error
        reason = first_line(error)
        raise CellError(f"{name}: {source} does not load ({reason})") from error
    missing = [*report["missing_keys"], *(key for key, *_ in report.get("mismatched_keys", []))]
    if missing:
        raise KeysDiffer(f"{name}: {source} lacks {len(missing)} tensors of {found}, the first is {min(missing)}")
    return model.eval().float(), weight_files(config_file.parent)


def weight_files(folder: Path) -> tuple[Path, ...]:
    """Those of a diffusers model that are read: safetensors where there are any."""
    return tuple(sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin")))


def file_hash(path: Path) -> str:
    """The sha256 of a file, which the hub's cache calls its large files by."""
    name = path.resolve().name
    return name if re.fullmatch("[0-9a-f]{64}", name) else file_sha256(path)


def names_in(source: str, subfolder: str, config_file: Path) -> list[str]:
    """Files beside a model's config: in its repository, or on this machine where the hub cannot be asked."""
    if not Path(source).is_dir() and not local_only():
        with contextlib.suppress(HfHubHTTPError, OSError):
            prefix = f"{subfolder}/" if subfolder else ""
            return [file.removeprefix(prefix) for file in list_repo_files(source) if file.startswith(prefix)]
    return [file.name for file in config_file.parent.iterdir()]


def weights_of(names: Iterable[str]) -> tuple[str, bool | None]:
    """(variant, whether as safetensors) of the weights among files: full ones before variants; ("", None) of none."""
    found = [match for match in map(WEIGHTS.fullmatch, names) if match]
    choices = [(match["variant"] or "", match["kind"] == "safetensors") for match in found]
    return min(choices, key=lambda one: (one[0] != "", one[0] != "fp16", one[0], not one[1]), default=("", None))


@cache
def unreachable(endpoint: str) -> bool:
    """The hub's name does not resolve and there is no proxy: asking would only be tried again for half a minute."""
    if getproxies():
        return False
    try:
        socket.getaddrinfo(urlsplit(endpoint).hostname, None)
    except OSError:
        return True
    return False


def local_only() -> bool:
    """Nothing may or can be fetched: only what is on this machine counts."""
    return offline() or unreachable(constants.ENDPOINT)


def fetch(repo: str, file: str, name: str) -> Path:
    """A file of a hub repository, from the cache or fetched. Raises CellError saying what to do."""
    try:
        return Path(hf_hub_download(repo, file, local_files_only=local_only()))
    except GatedRepoError as error:
        advice = f"accept its licence at https://huggingface.co/{repo}, then run: hf auth login"
        raise CellError(f"{name}: {repo} is gated; {advice}") from error
    except RepositoryNotFoundError as error:
        raise CellError(f"{name}: the hub has no repository {repo}, or it is private (hf auth login)") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise CellError(
            f"{name}: {repo} is not on this machine and cannot be fetched; connect, or give a folder"
        ) from error
    except EntryNotFoundError as error:
        raise CellError(f"{name}: {repo} has no {file}; give another folder: hf:{repo}:FOLDER") from error
    except HFValidationError as error:
        raise CellError(f"{name}: {repo} is no repository name") from error
    except (HfHubHTTPError, OSError) as error:
        raise CellError(f"{name}: {repo} cannot be fetched ({first_line(error)})") from error


def load_weights(
    model: nn.Module,
    path: Path,
    row: Published,
    weights: str | None,
    own_names: Callable[[dict[str, Tensor]], Mapping[str, Tensor]] = dict,
) -> Published:
    """Fill a model from the set `weights` of a file; the row, with a note where the file holds others.

    `own_names` gives the tensors under the model's names. Raises CellError as `read_tensors` and `fill`.
    """
    tensors, note = read_tensors(path, row.name, weights)
    fill(model, own_names(tensors), path, row.name)
    files = (*row.files, path) if weights is None else ()  # of the set that its authors evaluate
    return replace(row, note="; ".join(dict.fromkeys(filter(None, (*row.note.split("; "), note)))), files=files)


def read_tensors(path: Path, name: str, weights: str | None = None) -> tuple[dict[str, Tensor], str]:
    """One set of weights of a .safetensors, .pt or .ckpt file, and a note on the others.

    `weights` is one of SETS; None is the first of them that the file holds. Raises CellError for a damaged file, for
    one that torch's weights_only reader refuses, and for one without such weights.
    """
    held = _read(path, name)
    found = {key: tensors for key, tensors in _sets(held).items() if tensors}
    if not found:
        raise CellError(f"{name}: {path} holds {preview([str(key) for key in held]) or 'nothing'}: no named tensors")
    chosen = weights or min(found, key=SETS.index)
    if chosen not in found:
        raise CellError(f"{name}: {path} holds the weights {', '.join(found)}; not {chosen}")
    others = [other for other in found if other != chosen]
    note = f"weights {chosen} of a file that also holds {' and '.join(others)} (@weights={others[0]})" if others else ""
    return found[chosen], note


def _sets(held: Mapping[Any, Any], called: str = "model") -> dict[str, dict[str, Tensor]]:
    """Every set of weights below a mapping, by its name there."""
    inner = {key: held[key] for key in SETS if isinstance(held.get(key), Mapping)}
    if inner:
        return {name: tensors for key, value in inner.items() for name, tensors in _sets(value, key).items()}
    tensors = _unwrapped(held)
    plain = {key: value for key, value in tensors.items() if not key.startswith("model_ema.")}
    # Latent diffusion keeps averages under the names of what they are averages of, without dots.
    average = {key: tensors.get(f"model_ema.{key.replace('.', '')}", value) for key, value in plain.items()}
    averaged = any(average[key] is not value for key, value in plain.items())
    return {"model_ema": average, called: plain} if averaged else {called: tensors}


def _unwrapped(held: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Tensors under the names that their model gives them; of a whole diffusion model its first stage alone."""
    names = {str(key): key for key, value in held.items() if isinstance(value, Tensor)}
    names = {name: key for name, key in names.items() if "first_stage_model." in name} or names
    tensors = {WRAPPERS.sub("", name): held[key] for name, key in names.items()}
    return tensors if len(tensors) == len(names) else {name: held[key] for name, key in names.items()}


def _read(path: Path, name: str) -> Mapping[Any, Any]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        held = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise CellError(f"{name}: {path} {REFUSED}") from error
    except (*FILE_ERRORS, SafetensorError) as error:
        raise CellError(f"{name}: {path} is damaged or half downloaded ({first_line(error)})") from error
    if not isinstance(held, Mapping):
        raise CellError(f"{name}: {path} holds a {type(held).__name__}, not named tensors")
    return held


def fill(module: nn.Module, tensors: Mapping[str, Any], path: Path, name: str) -> None:
    """Load every tensor as float32. Raises CellError if one is missing, left over or of another shape."""
    try:
        load_strictly(module, {key: value.float() for key, value in tensors.items()}, path)
    except InputError as error:
        raise KeysDiffer(f"{name}: {error}") from error


def checkpoint(row: Published, file: Path | None) -> Path:
    """The file of a row: the one given, or its own from the hub. Raises CellError that says where to get it."""
    if file is None and not row.repo:
        raise CellError(f"{row.name}: not on the hub; download {row.file} ({row.note}) and write {row.name}:{row.file}")
    return file or fetch(row.repo, row.file, row.name)


def part(row: Published, folder: Path | None, file: str) -> Path:
    """A file of a row that has several: below the folder given, or from the hub."""
    return folder / file if folder else fetch(row.repo, file, row.name)


def read_config(path: Path, name: str) -> dict[str, Any]:
    """A config.json. Raises CellError if it is none."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CellError(f"{name}: {path} is not readable ({first_line(error)})") from error
    if not isinstance(held, dict):
        raise CellError(f"{name}: {path} holds no named values")
    return held


def fetch_url(url: str, sha256: str, name: str) -> Path:
    """A file that is not on the hub, from the cache or downloaded and checked. Raises CellError saying what to do."""
    place = cache_folder() / "models" / url.rpartition("/")[2]
    try:
        if not place.is_file():
            if offline():
                raise CellError(f"{name}: TOKBENCH_OFFLINE is set; download {url} and write {name}:FOLDER")
            place.parent.mkdir(parents=True, exist_ok=True)
            download(url, place.with_suffix(".part"), sha256, name).replace(place)
        return check_file(place, sha256, name)
    except (WeightsError, OSError) as error:
        raise CellError(f"{name}: {error}; or download it by hand and write {name}:FOLDER") from error


def model_class(name: str, kind: str) -> Any:
    """A class of diffusers. Raises CellError if it is none, or no autoencoder."""
    import diffusers

    # Its remarks on what is harmless, and its bars for what takes a moment; what matters is raised here.
    diffusers.logging.set_verbosity(diffusers.logging.CRITICAL)
    diffusers.logging.disable_progress_bar()
    found = getattr(diffusers, kind, None)
    if found is None or not all(hasattr(found, method) for method in ("encode", "decode", "from_pretrained")):
        raise CellError(f"{name}: {kind} is no autoencoder of diffusers {diffusers.__version__}")
    return found
