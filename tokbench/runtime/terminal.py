"""What a waiting person sees: a bar on a terminal, else one line with the expected duration. Always on stderr."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.console import Console

SHOW_AFTER = 30.0  # seconds a job must be expected to take before a log is told so


def say(text: str) -> None:
    """A line for whoever watches; never among the results."""
    print(text, file=sys.stderr, flush=True)


def stdout_console(width: int) -> "Console":
    """For tables on stdout: as wide as the terminal, else as COLUMNS says, else `width`; NO_COLOR is rich's own."""
    from rich.console import Console  # rich takes a tenth of a second that most commands can spare

    columns = os.environ.get("COLUMNS", "")
    return Console(width=None if sys.stdout.isatty() else int(columns) if columns.isdigit() else width)


class Advance(Protocol):
    """Call it with how many more are done; `note` is what a bar shows in place of its own rate."""

    def __call__(self, count: int, note: str = "") -> None: ...


@contextmanager
def bar(what: str, total: int, unit: str = "images", done: int = 0, show: bool = True) -> Iterator[Advance]:
    """Yields a function that moves the bar. The bar appears only on a terminal and after two seconds."""
    if not show:
        yield lambda count, note="": None
        return
    if not sys.stderr.isatty():
        yield _estimate(what, total, unit, done)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    # A long note takes what the others leave of the line, and is cut there.
    rest = Column(ratio=1, no_wrap=True, overflow="ellipsis")
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn(),
               TextColumn("{task.fields[rate]}", table_column=rest))  # fmt: skip
    start = time.monotonic()
    with Progress(*columns, console=Console(stderr=True), transient=True, expand=True) as progress:
        task = progress.add_task(what, total=total, completed=done, rate="", visible=False)
        finished = 0

        def advance(count: int, note: str = "") -> None:
            nonlocal finished
            finished += count
            seconds = time.monotonic() - start
            rate = note or f"{finished / max(seconds, 1e-9):.1f} {unit}/s"
            progress.update(task, advance=count, rate=rate, visible=seconds > 2)

        yield advance


def _estimate(what: str, total: int, unit: str, done: int) -> Advance:
    """Without a terminal: once, after a few batches, say how long it will take, if that is worth saying."""
    start, finished, calls = time.monotonic(), 0, 0

    def advance(count: int, note: str = "") -> None:
        nonlocal finished, calls
        finished, calls = finished + count, calls + 1
        left = (time.monotonic() - start) / finished * (total - done - finished)
        if calls == 3 and left > SHOW_AFTER:
            say(f"{what}: {total} {unit}, about {duration(left)} left")

    return advance


def duration(seconds: float) -> str:
    """12 s, 3 min, 1 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
