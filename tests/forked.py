"""Real processes of the command line for tests, forked so that torch need not be imported again."""

import os
import signal
import socket
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

from tokbench import cli


@dataclass
class Process:
    """A run in a process of its own, forked so that torch need not be imported again; stderr goes to a file."""

    pid: int
    errors: Path

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def finish(self) -> tuple[int, str]:
        """Exit status (negative: the signal that ended it) and stderr."""
        until = time.monotonic() + 60
        while (ended := os.waitpid(self.pid, os.WNOHANG))[0] == 0:
            if time.monotonic() > until:
                self.signal(signal.SIGKILL)
            time.sleep(0.01)
        return os.waitstatus_to_exitcode(ended[1]), self.errors.read_text()


def start(arguments: list[str], errors: Path, world: int = 1) -> list[Process]:
    """`world` processes of one run, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in range(world):
        log = errors / f"stderr-{len(list(errors.glob('stderr-*')))}"
        log.touch()
        place = {"WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_RANK": str(rank)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python 3.12 warns of forking where threads exist
            pid = os.fork()
        if pid == 0:
            become(arguments, log, {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
        processes.append(Process(pid, log))
    return processes


def become(arguments: list[str], log: Path, environment: dict[str, str]) -> None:
    """Turn this forked process into a command; never returns."""
    status = 70
    try:
        os.dup2(os.open(log, os.O_WRONLY), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stderr, sys.stdout = os.fdopen(2, "w", 1, closefd=False), os.fdopen(1, "w", closefd=False)
        os.environ.update(environment)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = ["tokbench", *arguments]
        cli.main()
    except SystemExit as ended:
        status = int(ended.code or 0)
    finally:
        os._exit(status)
