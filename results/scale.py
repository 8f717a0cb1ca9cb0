"""What an evaluation of ten tokenizers costs, for docs/scale.md:    python -m results.scale

A tokenizer's time on a GPU is the measured one where results/speed has a CUDA record of it, else it follows from its
counted FLOPs and an assumed rate, and the table says so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokbench.report.speed import read_speeds
from tokbench.report.tables import Heading, markdown, plain

IMAGES, SIDES, GPUS = 50_000, (128, 256, 512), (1, 8, 64)
# GFLOP of an image at 256 px, encoder and decoder, as `tokbench speed` counts them (FLOP = 2 x MAC).
COUNTED = {
    "ssdd-s-f8c4@steps=1": (273, 171), "ssdd-b-f8c4@steps=1": (273, 235), "ssdd-m-f8c4@steps=1": (273, 531),
    "ssdd-l-f8c4@steps=1": (273, 688), "ssdd-m-f8c4@steps=8": (273, 8 * 531), "sd-vae-ft-mse": (271, 620),
    "sdxl-vae": (271, 620), "flux1-vae": (271, 620), "dc-ae-f32c32-in": (521, 692), "taesd": (31, 35),
}  # fmt: skip
Times = Mapping[tuple[str, int], float]  # (tokenizer, side) -> seconds of a measured round trip
METRICS = 107  # GFLOP of LPIPS on both nets and Inception at 256 px, always in float32


@dataclass(frozen=True)
class Machine:
    """Assumptions, to be replaced by measurements. Rates in GFLOP/s of convolutions, well below the data sheet's."""

    rates: Mapping[str, float]
    decode: float = 2.0e-3  # seconds of a core to decode and crop a JPEG of ImageNet's size
    statistics: float = 120.0  # seconds of one process at a cell's end: Fréchet distances, halves of the data, writing


H100 = Machine({"float32": 4.0e4, "bfloat16": 2.5e5})


def seconds_an_image(name: str, side: int, dtype: str, machine: Machine, measured: Times) -> float:
    """Of a GPU: the round trip and its metrics."""
    area = (side / 256) ** 2
    scored = METRICS * area / machine.rates["float32"]
    return measured.get((name, side), sum(COUNTED[name]) * area / machine.rates[dtype]) + scored


def hours(gpus: int, dtype: str, machine: Machine, measured: Times) -> float:
    """All images with all tokenizers at all sides; statistics are one process's, while the others wait."""
    shared = sum(seconds_an_image(name, side, dtype, machine, measured) for name in COUNTED for side in SIDES)
    return (IMAGES * shared / gpus + machine.statistics * len(COUNTED) * len(SIDES)) / 3600


def cores(name: str, side: int, dtype: str, machine: Machine, measured: Times) -> float:
    """Of each GPU, so that decoding JPEGs keeps up with it. Later tokenizers of a run read kept crops instead."""
    return machine.decode / seconds_an_image(name, side, dtype, machine, measured)


def measured_times(folder: Path, dtype: str) -> Times:
    """(name, side) -> seconds of a round trip, from CUDA records in this precision."""
    found: dict[tuple[str, int], float] = {}
    for record in read_speeds(folder)[0]:
        stage = record.stages.get("round-trip")
        if stage and not record.hardware.startswith("CPU") and record.settings.get("dtype") == dtype:
            found[str(record.settings.get("spec")), record.resolution] = 1 / stage.images_per_second
    return found


def tables(folder: Path, machine: Machine = H100) -> str:
    """The page's tables as Markdown."""
    measured = {dtype: measured_times(folder, dtype) for dtype in machine.rates}
    whole = [[dtype, *(f"{hours(n, dtype, machine, measured[dtype]):.1f}" for n in GPUS)] for dtype in machine.rates]
    each: list[Sequence[str]] = []
    for name in COUNTED:
        times = [f"{1000 * seconds_an_image(name, 256, d, machine, measured[d]):.1f}" for d in machine.rates]
        needed = [f"{cores(name, side, 'bfloat16', machine, measured['bfloat16']):.1f}" for side in SIDES]
        source = "measured" if any((name, 256) in found for found in measured.values()) else "counted"
        each.append([name, f"{sum(COUNTED[name]):,}", *times, *needed, source])
    job = [Heading(key="precision"), *(Heading(key=f"{n} GPU{'s' if n > 1 else ''}", unit="hours") for n in GPUS)]
    rows = [
        Heading(key="tokenizer"), Heading(key="cost", unit="GFLOP"),
        *(Heading(key=dtype, unit="ms/img") for dtype in machine.rates),
        *(Heading(key=f"cores at {side}") for side in SIDES), Heading(key="time is", words=True),
    ]  # fmt: skip
    return f"{markdown(plain('', job, whole))}\n{markdown(plain('', rows, each))}"


if __name__ == "__main__":
    print(tables(Path(__file__).parent / "speed"))
