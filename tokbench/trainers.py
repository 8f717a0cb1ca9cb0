"""Which models `tokbench train` knows: a registry like that of tokenizers. Never imports torch by itself."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokbench import registry
from tokbench.errors import InputError
from tokbench.store import writable


@dataclass(frozen=True)
class TrainOptions:
    """What the command line says about a training run."""

    data: str  # as for `tokbench run`
    out: Path
    stage: str | None = None
    preset: str | None = None
    start: Path | None = None  # --from: the previous stage's file
    encoder_from: Path | None = None
    encoder: str | None = None  # sizes by name: f8c4, S
    decoder: str | None = None
    settings: tuple[str, ...] = ()  # key=value


@dataclass(frozen=True)
class Trainer:
    """`run` trains and returns the file of the finished model; `settings` gives the key=value lines of its defaults for
    a stage and a preset (None: the default one). Both raise InputError for a stage or preset that is not known."""

    run: Callable[[TrainOptions], Path]
    settings: Callable[[str | None, str | None], list[str]]
    summary: str


_trainers: dict[str, Trainer] = {}


def register_trainer(name: str, trainer: Trainer) -> None:
    """Make `tokbench train NAME` known; a plugin's `register` calls it. ValueError for a second use of a name."""
    if name in _trainers:
        raise ValueError(f"{name}: a trainer of this name is registered already")
    _trainers[name] = trainer


def trainers() -> dict[str, Trainer]:
    """All of them, plugins included, by name."""
    registry.entries()  # loads the plugins
    return dict(sorted(_trainers.items()))


def find_trainer(name: str) -> Trainer:
    known = trainers()
    if name not in known:
        raise InputError(f'unknown model to train "{name}"; {registry.suggest(name, list(known))}')
    return known[name]


def train_model(name: str, options: TrainOptions) -> Path:
    """Train and return the finished file. Raises InputError for a missing --data or for an --out that is missing or
    cannot be written, before anything is fetched or built."""
    trainer = find_trainer(name)
    if not options.data or options.out == Path():
        raise InputError(f"train {name}: --data DIR and --out DIR are needed")
    existing = next(place for place in (options.out, *options.out.absolute().parents) if place.exists())
    with writable(options.out):
        tempfile.TemporaryFile(dir=existing).close()
    return trainer.run(options)


def train_help(name: str | None, stage: str | None, preset: str | None) -> str:
    """What can be trained, or every setting of one of them as key=value."""
    if name is None:
        return "\n".join(["Models:", *(f"  {known:<8} {trainer.summary}" for known, trainer in trainers().items())])
    which = " ".join(f"{what} {given}" for what, given in (("stage", stage), ("preset", preset)) if given)
    return "\n  ".join([f"Settings of {name} {which}".rstrip() + ":", *find_trainer(name).settings(stage, preset)])


def choose(known: Sequence[str], name: str | None, what: str, default: str) -> str:
    """`name`, or the default for None; InputError naming all choices if it is not known."""
    if name is not None and name not in known:
        raise InputError(f'unknown {what} "{name}"; known: {", ".join(known)}')
    return name or default


def _run_dit(options: TrainOptions) -> Path:
    from tokbench.config import override
    from tokbench.generation.train import find_preset, train

    if options.stage or options.start or options.encoder_from or options.encoder or options.decoder:
        raise InputError("dit has no --stage, --from, --encoder-from, --encoder or --decoder; set tokenizer=SPEC")
    return train(override(find_preset(options.preset or "dit"), options.settings), options.data, options.out)


def _dit_settings(stage: str | None, preset: str | None) -> list[str]:
    from tokbench.config import describe
    from tokbench.generation.train import find_preset

    return describe(find_preset(preset or "dit"))


register_trainer("dit", Trainer(_run_dit, _dit_settings, "diffusion transformer in a tokenizer's latents, for gFID"))
