"""The options of one measurement: listed here and nowhere else. The command line fills it, a record keeps it."""

from dataclasses import MISSING, dataclass, field, replace
from typing import Any, Literal

from tokbench.protocols import NATIVE, Protocol, Resolution, find_protocol

REQUIRED = MISSING


def option(default: Any, text: str) -> Any:
    """A field with the help that the command line shows; REQUIRED: without a default."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """How images are measured, whatever the tokenizer and the data: of run, score, generate and held-out images alike.

    The texts are those of `tokbench run --help`, which turns every field but `resolution` into an option.
    """

    resolution: Resolution = 256
    protocol: str = option("adm", "Evaluation protocol; see `tokbench list protocols`.")
    metrics: tuple[str, ...] = option((), "Metrics, comma-separated; see `tokbench list metrics`. Default: its set.")
    seeds: tuple[int, ...] = option((0,), "Seeds of a stochastic decoder, comma-separated.")
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "float32, bfloat16 or float16.")
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps.")
    batch_size: int | None = option(None, "auto or a number of images; a CPU computes one at a time.")
    workers: int | None = option(None, "Processes that load images; auto: by their number.")
    small: Literal["enlarge", "skip", "refuse"] | None = option(
        None, "enlarge, skip or refuse images below the resolution; auto: as the protocol."
    )
    skip_bad: bool = option(False, "Leave out unreadable images, and count them.")
    keep_features: bool = option(False, "Keep features beside the result.")
    save_images: int = option(4, "First N and worst N images in the picture of a cell.")

    @property
    def rules(self) -> Protocol:
        """The protocol with what the other options change of it; another fingerprint if they do."""
        protocol = find_protocol(self.protocol)
        native = self.resolution == NATIVE
        name = f"{protocol.name}-{NATIVE}" if native else protocol.name
        return replace(protocol, name=name, native=native, small=self.small or protocol.small)
