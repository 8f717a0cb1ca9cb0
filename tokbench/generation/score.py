"""Scores of generated images against a reference: ADM's statistics file, or images of any source."""

import hashlib
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tokbench.data import open_source
from tokbench.distributed import World
from tokbench.errors import InputError
from tokbench.features import Extractor
from tokbench.loader import Loader
from tokbench.metrics import FRECHET_MINIMUM, METRICS, find_metrics, frechet
from tokbench.progress import bar
from tokbench.protocols import find_protocol
from tokbench.result import Value
from tokbench.store import SampleStore

DEFAULT = ("gfid", "is", "precision", "recall", "kid", "fd-dinov2", "fd-mobilenet")
INCEPTION_DIM = 2048


def generation_metrics(text: str | None) -> list[str]:
    """The metrics asked for, in the table's order. InputError for one that needs the image that was reconstructed."""
    names = list(DEFAULT) if text is None else [name.strip() for name in text.split(",") if name.strip()]
    for metric in find_metrics(names):
        if metric.scope == "reconstruction" or metric.name == "rfid":
            known = ", ".join(m.name for m in METRICS.values() if m.scope != "reconstruction" and m.name != "rfid")
            raise InputError(
                f"--metrics {metric.name}: compares an image with its reconstruction; generation has {known}"
            )
    return [metric.name for metric in find_metrics(names)]


@dataclass
class Reference:
    """What generated images are compared with. `stored` moments are those of a statistics file."""

    name: str
    fingerprint: str
    num_images: int  # whose features are at hand
    store: SampleStore | None
    stored: Mapping[str, frechet.Moments]

    def moments(self, extractor: str) -> frechet.Moments:
        if extractor in self.stored:
            return self.stored[extractor]
        return frechet.moments(self.features(extractor))

    def features(self, extractor: str) -> np.ndarray:
        """float32 [N, D]; LookupError with the reason if the reference holds no images."""
        if self.store is None:
            raise LookupError(f"{self.name} holds statistics only, no images (arr_0); give a folder as --reference")
        return self.store.features("real", extractor)


def read_statistics(path: Path) -> tuple[frechet.Moments | None, np.ndarray | None]:
    """Moments of Inception features and images uint8 [N, H, W, 3] of an ADM reference (mu, sigma, arr_0), either or
    both. Raises InputError for another file or another dimension."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if not {"mu", "sigma"} <= set(file.files) and "arr_0" not in file.files:
                raise InputError(f"{path}: holds {', '.join(file.files) or 'nothing'}; expected mu and sigma, or arr_0")
            mean, cov = (np.asarray(file[k], np.float64) if k in file.files else None for k in ("mu", "sigma"))
            images = file["arr_0"] if "arr_0" in file.files else None
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise InputError(f"{path}: not a readable statistics file ({error})") from error
    if images is not None and (images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3):
        raise InputError(f"{path}: arr_0 is {images.dtype} {images.shape}, expected uint8 [N, H, W, 3]")
    if mean is None or cov is None:
        return None, images
    if mean.shape != (INCEPTION_DIM,) or cov.shape != (INCEPTION_DIM, INCEPTION_DIM):
        raise InputError(
            f"{path}: statistics of shapes {mean.shape} and {cov.shape}; FID's Inception features have "
            f"{INCEPTION_DIM} dimensions"
        )
    return frechet.Moments(0, mean, cov), images


def open_reference(
    text: str, resolution: int, extractors: Mapping[str, Extractor], folder: Path, device: torch.device, world: World
) -> Reference:
    """The reference of a text: an .npz file, or what `--data` takes. Features of its images are kept under `folder`.

    Raises InputError for a file that is no reference, or whose images have another size.
    """
    stored: dict[str, frechet.Moments] = {}
    batches: Iterable[tuple[Sequence[str], torch.Tensor]]
    if text.endswith(".npz"):
        path = Path(text)
        moments, images = read_statistics(path)
        with open(path, "rb") as file:
            fingerprint, name = hashlib.file_digest(file, "sha256").hexdigest(), path.stem.lower()
        if moments is not None:
            stored["inception"] = moments
        if images is None:
            return Reference(name, fingerprint, 0, None, stored)
        if images.shape[1:3] != (resolution, resolution):
            raise InputError(
                f"{path}: images of {images.shape[1]} x {images.shape[2]} px, generated are {resolution} px"
            )
        ids = [f"{i:08d}" for i in range(len(images))]

        def read(wanted: list[int]) -> Iterable[tuple[Sequence[str], torch.Tensor]]:
            for i in range(0, len(wanted), 32):
                part = wanted[i : i + 32]
                yield [ids[k] for k in part], torch.from_numpy(images[part]).permute(0, 3, 1, 2).contiguous()
    else:
        source = open_source(text)
        fingerprint, name, ids = source.fingerprint(), source.name, source.ids

        def read(wanted: list[int]) -> Iterable[tuple[Sequence[str], torch.Tensor]]:
            return Loader(source, resolution, find_protocol("adm"), batch_size=32, indices=wanted, upscale=True)

    folder = folder / f"reference-{fingerprint[:16]}-{resolution}"
    with SampleStore(folder, rank=world.rank) as store:
        done = store.done([], [("real", name) for name in extractors])
        batches = read([i for i in range(world.rank, len(ids), world.size) if ids[i] not in done])
        with bar("reference", len(ids) // world.size) as advance, torch.inference_mode():
            for batch, real in batches:
                on_device = real.to(device)
                features = {("real", name): extract(on_device).cpu().numpy() for name, extract in extractors.items()}
                store.append(batch, {}, features)
                advance(len(batch))
    world.gather(None)
    return Reference(name, fingerprint, len(ids), SampleStore(folder), stored)


@dataclass(frozen=True)
class _Both:
    """Generated samples and their reference, as metrics read them; the two sides may differ in number."""

    store: SampleStore
    reference: Reference
    num_images: int  # the store may hold more, of a longer run

    @property
    def ids(self) -> list[str]:
        return self.store.ids[: self.num_images]

    def column(self, name: str) -> np.ndarray:
        return self.store.column(name)[: self.num_images]

    def features(self, side: str, extractor: str) -> np.ndarray:
        if side == "real":
            return self.reference.features(extractor)
        return self.store.features(side, extractor)[: self.num_images]


def score(
    names: Sequence[str], store: SampleStore, reference: Reference, num_images: int
) -> tuple[dict[str, Value], dict[str, str]]:
    """Values of the metrics whose features are there, and why others cannot be given."""
    values: dict[str, Value] = {}
    unavailable: dict[str, str] = {}
    both = _Both(store, reference, num_images)
    for name in names:
        metric = METRICS[name]
        try:
            if num_images < metric.minimum:
                note = f"needs {metric.minimum:,} images, here {num_images:,}; kid serves at any number"
                values[name] = Value(None, n=num_images, note=note)
            elif metric.minimum == FRECHET_MINIMUM:
                assert metric.extractor is not None
                values[name] = frechet_value(reference, both.features("fake", metric.extractor), metric.extractor)
            else:
                values[name] = metric.compute(both)
        except LookupError as error:
            unavailable[name] = str(error.args[0])
    return values, unavailable


def frechet_value(reference: Reference, fake: np.ndarray, extractor: str) -> Value:
    """The distance from the reference's moments; fewer reference images than FRECHET_MINIMUM give none either."""
    real = reference.moments(extractor)
    if 0 < real.n < FRECHET_MINIMUM:
        return Value(
            None, n=len(fake), note=f"needs {FRECHET_MINIMUM:,} reference images, {reference.name} has {real.n}"
        )
    return Value(frechet.distance(real, frechet.moments(fake)), n=len(fake), note=f"against {reference.name}")
