"""What a waiting person sees: a bar on a terminal, else one line with the expected duration. Always on stderr."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SHOW_AFTER = 30.0  # seconds a job must be expected to take before a log is told so


def say(text: str) -> None:
    """A line for whoever watches; never among the results."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def bar(
    what: str, total: int, unit: str = "images", done: int = 0, show: bool = True
) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with how many more are done. A bar appears only on a terminal and after two seconds."""
    if not show:
        yield lambda count: None
        return
    if not sys.stderr.isatty():
        yield _estimate(what, total, unit, done)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TextColumn("{task.fields[rate]}"), TimeRemainingColumn())  # fmt: skip
    start = time.monotonic()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total, completed=done, rate="", visible=False)
        finished = 0

        def advance(count: int) -> None:
            nonlocal finished
            finished += count
            seconds = time.monotonic() - start
            rate = f"{finished / max(seconds, 1e-9):.1f} {unit}/s"
            progress.update(task, advance=count, rate=rate, visible=seconds > 2)

        yield advance


def _estimate(what: str, total: int, unit: str, done: int) -> Callable[[int], None]:
    """Without a terminal: once, after a few batches, say how long it will take, if that is worth saying."""
    start, finished, calls = time.monotonic(), 0, 0

    def advance(count: int) -> None:
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
