"""The frozen networks that metrics need: where their files come from, whether they are right, how they are read.

In: a network's name; out: the path of a checked file, or a WeightsError that says how to get it.
"""

from tokbench.weights.files import WeightsError, check_file, file_sha256, load, offline
from tokbench.weights.networks import NETWORKS, Network, find_network
from tokbench.weights.store import (
    describe,
    digest,
    downloads,
    export,
    fetch,
    fetch_all,
    locate,
    missing,
    torch_cache,
    use_folder,
    verify,
    weights_dir,
)  # fmt: skip

__all__ = [
    "NETWORKS", "Network", "WeightsError", "check_file", "describe", "digest", "downloads", "export", "fetch",
    "fetch_all", "file_sha256", "find_network", "load", "locate", "missing", "offline", "torch_cache", "use_folder",
    "verify", "weights_dir",
]  # fmt: skip
