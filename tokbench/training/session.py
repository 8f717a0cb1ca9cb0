"""The one frame of every training loop: processes, resume, schedule, averages, log, scores, checkpoints, interruption.

    with open_session("klvae", config, out) as session:
        ...                                                # networks and data
        session.start(model, model.named_parameters())     # or go on from out/last.ckpt
        for step in session.steps(session.batches(crops)):
            for part in step.parts():
                ...                                        # losses: what a paper prints
                step.backward(loss, loss=loss)
            step.update(ids)

All randomness of a step comes from the numbers of its samples (`sample_seeds`), so a checkpoint needs no random state
and any number of processes takes the same steps.
"""

import io
import json
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from tokbench.checkpoints import load_strictly, read_checkpoint
from tokbench.config import to_dict
from tokbench.data.pixels import to_float
from tokbench.data.training_crops import PhotoCrops, batches
from tokbench.errors import FILE_ERRORS, InputError, unreadable
from tokbench.records.files import hold, write_whole
from tokbench.registry import TrainOptions
from tokbench.runtime.device import describe_device, find_dtype, select_device, warn_of_emulation
from tokbench.runtime.processes import Processes, cores, join
from tokbench.runtime.terminal import bar, say
from tokbench.tokenizer import Tokenizer
from tokbench.training.gradients import GradientAverage
from tokbench.training.held_out import score
from tokbench.training.log import Log, Meter, check_losses, interrupts, is_best
from tokbench.training.optimisation import (
    Ema,
    EmaConfig,
    OptimConfig,
    RunConfig,
    learning_rate,
    make_optimizer,
    optimizer_step,
    schedule_free_average,
)
from tokbench.training.track import open_tracker
from tokbench.weights.files import file_sha256

FREE_SETTINGS = (  # of `run`: may change when a run goes on, for they do not change its result
    "device", "workers", "steps", "compile", "log_every", "sample_every", "save_every",
    "eval_every", "eval_resolution", "eval_metrics", "best_by", "loss_limit", "track",
)  # fmt: skip

READ_EVERY = 100  # steps after which losses are looked at where no log is wanted

Batch = TypeVar("Batch")


class TrainingConfig(Protocol):
    """What a frozen dataclass of settings must hold to be trained by; the rest is the model's own."""

    @property
    def run(self) -> RunConfig: ...
    @property
    def optim(self) -> OptimConfig: ...
    @property
    def ema(self) -> EmaConfig: ...


@contextmanager
def open_session(name: str, config: TrainingConfig, out: Path) -> Iterator["Session"]:
    """Join the other processes, hold `out` against other runs and choose the device.

    Raises InputError where the settings do not suit the processes, or another run is in `out`.
    """
    with ExitStack() as stack:
        processes = stack.enter_context(join())
        if processes.main:
            stack.enter_context(hold(out))
        yield Session(name, config, out, processes, stack)


class Session:
    """One run of a loop. Writes into `out`: last.ckpt, log.jsonl, curves.png, samples/."""

    def __init__(self, name: str, config: TrainingConfig, out: Path, processes: Processes, stack: ExitStack) -> None:
        run = config.run
        if run.batch_size % (processes.size * run.accumulate):
            parts = f"{processes.size} x {run.accumulate} parts"
            raise InputError(f"run.batch_size={run.batch_size} cannot be cut into {parts}")
        self.device = select_device(run.device, processes.local_rank)
        self.run = run.on(self.device)
        if processes.main:
            warn_of_emulation(find_dtype(self.run.dtype), self.device)
        if self.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        self.config: TrainingConfig = replace(config, run=self.run)  # type: ignore[type-var]
        self.name, self.out, self.processes, self._stack = name, out, processes, stack
        self.checkpoint, self.first_step = out / "last.ckpt", 0
        self.interruptions: Sequence[int] = ()

    def start(self, model: nn.Module, named: Iterable[tuple[str, nn.Parameter]], **others: Any | None) -> None:
        """Make optimiser and average, or go on where `out` stopped.

        The averaged weights of `model` are scored and handed over, `named` are trained; `others` are whatever else
        has a state_dict that the run continues from, or None where this run has no such part.
        """
        named = list(named)
        self.parameters = [parameter for _, parameter in named if parameter.requires_grad]
        self.optimizer, self.ema = make_optimizer(named, self.config.optim), Ema(model, self.config.ema)
        self.state: dict[str, Any] = {"model": model, "ema": self.ema, "optimizer": self.optimizer}
        self.state |= {name: part for name, part in others.items() if part is not None}
        if (saved := load_checkpoint(self.checkpoint, self.config)) is not None:
            self.first_step = saved["step"]
            for part, stateful in self.state.items():
                stateful.load_state_dict(saved["parts"][part])
        if len(steps := set(self.processes.all_gather(self.first_step))) > 1:
            found = ", ".join(map(str, sorted(steps)))
            raise InputError(
                f"{self.checkpoint}: at steps {found}, by process; --out must be a folder that all of them see"
            )
        self.gradients = GradientAverage(self.parameters, self.processes)
        main, tracker = self.processes.main, None
        if main and self.run.track != "none":
            tracker = open_tracker(self.run.track, self.config, self.out, self.first_step)
            self._stack.callback(tracker.close)
        self.log, self.meter = Log(self.out / "log.jsonl", self.first_step, main, tracker), Meter()
        self.unread: list[tuple[int, Sequence[str], dict[str, Tensor]]] = []  # steps, their samples, their losses

    def batches(self, crops: PhotoCrops) -> Iterator[tuple[Sequence[int], Tensor, list[str]]]:
        """This process's share of every step that is left: sample numbers, uint8 [B, 3, s, s], sample ids."""
        run = self.run
        return batches(
            crops, first_step=self.first_step, num_steps=run.steps, batch_size=run.batch_size,
            rank=self.processes.rank, world=self.processes.size, num_workers=self.workers(bool(crops.kept)),
            pin_memory=self.device.type == "cuda",
        )  # fmt: skip

    def workers(self, decoded: bool) -> int:
        """Processes that read images for this one: as `run.workers` says; auto: one a core of this process's share, at
        most 12, or none where a CPU, busy with the network, trains on images that are kept `decoded` in memory."""
        if self.run.workers != "auto":
            return self.run.workers
        return 0 if decoded and self.device.type == "cpu" else min(12, cores())

    def steps(self, shares: Iterable[Batch]) -> Iterator["Step[Batch]"]:
        """A step for each share of a batch; after its body the run is saved, or stopped if that was asked for.

        Raises KeyboardInterrupt once a run told to stop, in whichever process, is saved.
        """
        from tokbench.report.curves import training_curves  # with it comes matplotlib: only once a run has begun

        run, main = self.run, self.processes.main
        if main:
            how = f"{run.dtype}{', compiled' if run.compile else ''}"
            say(f"train {self.name}: {self.processes.size} x {describe_device(self.device)}, {how}")
        self.interruptions = self._stack.enter_context(interrupts())
        self.advance = self._stack.enter_context(bar(f"train {self.name}", run.steps, "steps", self.first_step, main))
        for number, share in enumerate(shares, self.first_step + 1):
            step = Step(self, number, share)
            yield step
            if main and step.due(run.eval_every):
                training_curves({self.out.name: self.log.records()}, self.out / "curves.png")
            if main and step.saves:
                parts = {name: part.state_dict() for name, part in self.state.items()}
                save_checkpoint(self.checkpoint, self.config, {"parts": parts, "step": number})
            if step.stopping:
                say(f"stopped at step {number} of {run.steps}, saved; the same command goes on")
                raise KeyboardInterrupt

    def read(self) -> None:
        """Take over the losses of the steps since the last reading: the one wait for the device.

        Raises CellError for the first step with a loss that is no number or above the limit, naming its samples.
        """
        values = [value for _, _, losses in self.unread for value in losses.values()]
        means = iter(self.processes.mean(torch.stack([v.float().reshape(()) for v in values])).tolist())
        for step, ids, losses in self.unread:
            found = {name: next(means) for name in losses}
            check_losses(found, step, ids, self.checkpoint, self.run.loss_limit)
            self.meter.add(found, self.run.batch_size)
        self.unread.clear()

    def images(self, pixels: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> float32 in [-1, 1] on the device, channels last."""
        moved = pixels.to(self.device, non_blocking=True)
        return to_float(moved).contiguous(memory_format=torch.channels_last)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.run.dtype == "bfloat16")

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Inside, the model has the weights that are scored and handed over."""
        with schedule_free_average(self.optimizer), self.ema.applied():
            yield

    def record(self, stage: str, origin: Mapping[str, str]) -> dict[str, Any]:
        """What a model's file and card say about how it was made."""
        records = [record for record in self.log.records() if "seconds" in record]
        return {
            "stage": stage,
            "started_from": dict(origin),
            "images_seen": (records[-1]["step"] if records else 0) * self.run.batch_size,
            "seconds": round(sum(record["seconds"] for record in records), 1),
            "machine": describe_device(self.device),
            "command": shlex.join(["tokbench", *sys.argv[1:]]),
            "settings": to_dict(self.config),
        }

    def score(self, tokenizer: Tokenizer, held_out: Tensor, step: int) -> bool:
        """Log the means over held-out images, uint8 [N, 3, R, R]; whether they are the best so far."""
        run = self.run
        with torch.compiler.set_stance("force_eager"):  # of another size than crops: not worth a graph of its own
            scores = score(tokenizer, held_out, run.eval_metrics, self.device)
        self.log.write(step=step, **scores)
        return is_best(self.log.records(), run.best_by)


class Step(Generic[Batch]):
    """One step, counted from 1: this process's share of the batch, its gradients, what is due after it."""

    def __init__(self, session: Session, number: int, batch: Batch) -> None:
        self.session, self.number, self.batch = session, number, batch
        self.rate = learning_rate(number - 1, session.run.steps, session.config.optim)
        self.stopping = False
        self._terms: dict[str, Tensor] = {}
        self._last_part = False

    def parts(self) -> Iterator[slice]:
        """The share cut into `run.accumulate` parts, to be taken one after the other."""
        run = self.session.run
        size = run.batch_size // self.session.processes.size // run.accumulate
        for part in range(run.accumulate):
            self._last_part = part == run.accumulate - 1
            yield slice(part * size, (part + 1) * size)

    def backward(self, loss: Tensor, /, **terms: Tensor) -> None:
        """Add the gradient of a part's loss; `terms` are what the log says of it. Of a part's losses
        the first is the one that the session's parameters learn from."""
        accumulate = self.session.run.accumulate
        if self._last_part:
            self.session.gradients.expect()
            self._last_part = False
        (loss / accumulate).backward()
        for name, value in terms.items():
            self._terms[name] = self._terms.get(name, 0) + value.detach() / accumulate

    def update(self, ids: Sequence[str]) -> None:
        """Average over processes, clip, step, follow with the average, log. Raises CellError as Session.read does."""
        session, run = self.session, self.session.run
        session.gradients.average()
        norm = optimizer_step(session.optimizer, session.parameters, self.rate, session.config.optim.clip)
        with schedule_free_average(session.optimizer):
            session.ema.update(self.number - 1)
        session.unread.append((self.number, ids, self._terms | {"gradient": norm}))
        # One process may be told to stop before the others: all of them stop after the same step.
        self.stopping = session.processes.any(bool(session.interruptions))
        if self.saves or self.due(run.log_every or READ_EVERY) or self.due(run.eval_every):
            session.read()
        session.advance(1, session.meter.note())
        if self.due(run.log_every):
            session.log.write(step=self.number, rate=self.rate, **session.meter.take())

    def due(self, every: int) -> bool:
        """Whether something done `every` so many steps, and at the end, is to be done after this step. 0: never."""
        return every > 0 and (self.number % every == 0 or self.number == self.session.run.steps)

    @property
    def shows(self) -> bool:
        """Whether this process is to draw a picture after this step."""
        return self.session.processes.main and self.due(self.session.run.sample_every)

    @property
    def scores(self) -> bool:
        """Whether this process is to score held-out images after this step."""
        return self.session.processes.main and self.due(self.session.run.eval_every)

    @property
    def saves(self) -> bool:
        """Whether the run is saved after this step."""
        return self.stopping or self.due(self.session.run.save_every)

    def show(self, picture: Image.Image) -> None:
        self.session.log.show(self.number, picture)


def start_from(model: nn.Module, options: TrainOptions) -> dict[str, str]:
    """Load the weights that a run starts from, all (--from) and those of an `encoder` (--encoder-from).

    Returns which files they were. Raises InputError for a file that does not fit.
    """
    origin = {}
    for part, path in (("model", options.start), ("encoder", options.encoder_from)):
        if path is not None:
            module, prefix = (model, "") if part == "model" else (model.get_submodule(part), f"{part}.")
            load_strictly(module, read_checkpoint(path)[0], path, prefix)
            origin[part] = f"{path.name} {file_sha256(path)[:16]}"
    return origin


def save_checkpoint(path: Path, config: Any, state: Mapping[str, Any]) -> None:
    """Write a training state whole or not at all."""
    buffer = io.BytesIO()
    torch.save({"config": json.dumps(to_dict(config)), **state}, buffer)
    write_whole(path, buffer.getvalue())


def load_checkpoint(path: Path, config: Any) -> dict[str, Any] | None:
    """The state saved in `path`, or None if there is none yet. Raises InputError for a file that is no checkpoint or
    was written with settings that change the result, naming the first that differs."""
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        then = json.loads(state["config"])
    except FILE_ERRORS as error:
        raise InputError(f"{unreadable(path, 'training checkpoint', error)}; remove it to start again") from error
    now = json.loads(json.dumps(to_dict(config)))
    for settings in (then, now):
        settings |= {f"run.{k}": v for k, v in settings.pop("run").items() if k not in FREE_SETTINGS}
    for key in sorted(set(then) | set(now)):
        if then.get(key) != now.get(key):
            raise InputError(f"{path}: trained with {key}={then.get(key)}, not {now.get(key)}; use another --out")
    return state
