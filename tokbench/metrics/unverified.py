"""FID's Inception from a file that nobody vouches for: its metrics carry names of their own. Never imports torch."""

from dataclasses import replace
from pathlib import Path

from tokbench.errors import InputError
from tokbench.metrics import METRICS, RENAMED
from tokbench.weights import NETWORKS, file_sha256


def use_weights(path: Path | None, unverified: bool) -> None:
    """Let a file in the layout of torch-fidelity's stand for Inception in this process.

    Unless it is FID's own, rfid becomes rfid-unverified-HASH, by the first digits of the file's sha256, and so do all
    that need this network: no such number passes for FID's, nor for that of another file. InputError without
    `unverified`, and for a file that is not there.
    """
    if path is None:
        if unverified:
            raise InputError("--unverified: which file? write --weights FILE --unverified")
        return
    if not path.is_file():
        raise InputError(f"--weights {path}: no such file")
    sha256, known = file_sha256(path), NETWORKS["inception"]
    if sha256.startswith(known.sha256):
        NETWORKS["inception"] = replace(known, file=str(path.resolve()))
        return
    if not unverified:
        raise InputError(
            f"--weights {path}: not FID's Inception (sha256 {sha256[:16]}...); --unverified takes it, under names as "
            f"rfid-unverified-{sha256[:8]}"
        )
    ending = f"-unverified-{sha256[:8]}"
    own = replace(known, name=f"inception{ending}", file=str(path.resolve()), sha256=sha256, licence="unknown")
    NETWORKS["inception"] = NETWORKS[own.name] = own
    for metric in [metric for metric in METRICS.values() if "inception" in metric.networks]:
        networks = tuple(own.name if name == "inception" else name for name in metric.networks)
        RENAMED[metric.name] = f"{metric.name}{ending}"
        METRICS[RENAMED[metric.name]] = replace(metric, name=RENAMED[metric.name], networks=networks)
