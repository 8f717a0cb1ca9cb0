"""Everything that plugins make known by name: tokenizers, trainers, data sources and probes; metrics have their table.

A tokenizer's spec is `NAME`, `NAME@key=value@key=value`, `NAME:FILE`, a file or folder, `file.py:factory`, or two of
them joined by `+` (encoder of the first, decoder of the second); `alias=SPEC` names the row. Never imports torch by
itself.
"""

import ast
import difflib
import importlib.metadata
import importlib.util
import inspect
import itertools
import logging
import re
import sys
import tempfile
import tomllib
import typing
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from safetensors import SafetensorError

from tokbench.checkpoints import read_header
from tokbench.config import describe, override, parse_value
from tokbench.errors import MODEL_ERRORS, CellError, InputError, first_line, place
from tokbench.records.files import slug, writable
from tokbench.runtime.terminal import say

if TYPE_CHECKING:
    from tokbench.tokenizer import Tokenizer

log = logging.getLogger("tokbench")
T = TypeVar("T")

PLUGINS = "tokbench.plugins"
# What is known of a model before it is loaded: `facts` of an entry, columns of `tokbench list models`.
FACTS = ("family", "f", "c", "codes", "tokens", "bpp", "params", "px", "licence", "verified", "source", "options",
         "about")  # fmt: skip
SHOWN = ("family", "f", "c", "codes", "tokens", "params", "verified", "licence", "bpp")
TILING = ("tile", "overlap")  # options of every model, in pixels
ROW_NAME = re.compile(r"[a-z0-9_][a-z0-9._-]*")
UNTOLD = ("model", "last", "checkpoint", "pytorch_model", "diffusion_pytorch_model")  # files that their folder names
NEEDED = ("info", "networks", "encode", "decode")  # of a tokenizer
LOAD_ERRORS = (SafetensorError, *MODEL_ERRORS)


# ---- plugins ------------------------------------------------------------------------------------------------------


def _plugins() -> list[importlib.metadata.EntryPoint]:
    """Installed plugins; of a checkout that runs without being installed, those that its pyproject.toml names."""
    found = list(importlib.metadata.entry_points(group=PLUGINS))
    try:
        importlib.metadata.distribution("tokbench")
    except importlib.metadata.PackageNotFoundError:
        checkout = Path(__file__).parents[1] / "pyproject.toml"
        named = tomllib.loads(checkout.read_text(encoding="utf-8"))["project"]["entry-points"][PLUGINS]
        found += [importlib.metadata.EntryPoint(name, value, PLUGINS) for name, value in named.items()]
    return found


_loaded: list[str] = []  # what is installed


def load_plugins() -> None:
    """Let every plugin register what it brings, once a process; those of a plugin that asks for others' come later."""
    points = [] if _loaded else _plugins()
    _loaded.extend(point.name for point in points)
    for point in points:
        try:
            point.load()()
        except (ImportError, AttributeError) as error:  # somebody else's plugin must not stop the rest
            log.warning("plugin %s (%s) does not load: %s; reinstall or remove it", point.name, point.value, error)


class Names(Generic[T]):
    """Things of one kind by name."""

    def __init__(self, kind: str) -> None:
        self.kind, self._known = kind, dict[str, T]()

    def add(self, name: str, thing: T) -> None:
        """ValueError for a second use of a name."""
        if name in self._known:
            raise ValueError(f"{self.kind} {name!r}: taken already")
        self._known[name] = thing

    def all(self) -> dict[str, T]:
        """All of them, plugins' included, by name."""
        load_plugins()
        return dict(sorted(self._known.items()))

    def find(self, name: str) -> T:
        """InputError with close matches for a name that is not known."""
        known = self.all()
        if name not in known:
            everything = "" if len(known) <= LISTED else f"`tokbench list {self.kind}s` shows all {len(known)}"
            raise InputError(f'unknown {self.kind} "{name}"; {suggest(name, list(known), everything)}')
        return known[name]


LISTED = 15  # names that a message still holds


def suggest(name: str, known: Sequence[str], everything: str = "") -> str:
    """'did you mean X?' with up to five near matches for a name that is none of `known`, and how to see them all.

    A number stands for any other, or an option.
    """
    alike = {re.sub(r"\{\w+\}|\d+", "0", one): one for one in reversed(known)}
    close = [alike[one] for one in difflib.get_close_matches(re.sub(r"\d+", "0", name.lower()), alike, 5, 0.5)]
    end = everything or f"known: {', '.join(known) or 'none'}"
    return (f"did you mean {', '.join(close[:-1])}{' or ' * (len(close) > 1)}{close[-1]}? " if close else "") + end


# ---- tokenizers ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A registered tokenizer. `name` may hold placeholders ("jpeg-q{quality}") that are options of the factory."""

    name: str
    factory: Callable[..., Any]
    summary: str
    accepts: Callable[[Path], bool] | None = None  # which bare files and folders this entry opens as `file=`
    facts: Mapping[str, Any] = field(default_factory=dict)  # for `tokbench list models`, by its columns

    @property
    def options(self) -> dict[str, tuple[Any, Any]]:
        """Keyword -> (annotation, default or `inspect.Parameter.empty`), in the factory's order.

        Without an annotation the type is the default's, of no default `inspect.Parameter.empty`.
        """
        made_by = self.factory.__init__ if inspect.isclass(self.factory) else self.factory
        try:
            hints = typing.get_type_hints(made_by)
        except (NameError, TypeError):  # names for type checkers alone; what has no annotations
            hints = {}
        found = {}
        for p in inspect.signature(self.factory).parameters.values():
            if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL):
                kind = type(p.default) if isinstance(p.default, bool | int | float | str) else inspect.Parameter.empty
                found[p.name] = hints.get(p.name, kind), p.default
        return found

    def match(self, head: str) -> dict[str, str] | None:
        """The placeholders' texts if `head` is one of this entry's names."""
        pattern = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[^-:@+]+)", re.escape(self.name))
        found = re.fullmatch(pattern, head, re.IGNORECASE)
        return found.groupdict() if found else None


@dataclass(frozen=True)
class Part:
    """One tokenizer of a spec: the entry and its options, already typed; `name` is a row's name but for odd letters."""

    text: str
    name: str
    entry: Entry
    options: Mapping[str, Any] = field(default_factory=dict)
    tiling: Mapping[str, int] = field(default_factory=dict)  # of TILING


@dataclass(frozen=True)
class Spec:
    """A parsed spec: `row` names the row, `text` is the spec without its alias, `parts` are one or two.

    `given`: the name was asked for, so a model's own `info.name` does not matter.
    """

    row: str
    text: str
    parts: tuple[Part, ...]
    given: bool = False


TOKENIZERS: Names[Entry] = Names("model")


def register(
    name: str,
    factory: Callable[..., Any],
    *,
    summary: str,
    accepts: Callable[[Path], bool] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Make `factory(**options) -> Tokenizer` known as `name`; its annotated keywords are the options of the spec.

    The parameter `file` takes the rest of `NAME:REST`; a parameter `random_weights: bool = False` says that the model
    can be built without its checkpoint. `facts` are shown by `tokbench list models`. Heavy imports belong inside the
    factory. Raises ValueError for a second use of a name or a placeholder that is no option.
    """
    entry = Entry(name, factory, summary, accepts, facts or {})
    if missing := set(re.findall(r"\{(\w+)\}", name)) - set(entry.options):
        raise ValueError(f"{name}: no option {sorted(missing)}")
    TOKENIZERS.add(name, entry)


def catalogue(family: str = "", columns: Sequence[str] = (), sort: str = "") -> list[dict[str, Any]]:
    """Every entry of a family ("": all) by name or by a column: {"model": name, column: value or None}.

    Raises InputError for a family or a column that there is not.
    """
    rows: list[dict[str, Any]] = [
        {"model": e.name, "about": e.summary, "options": " ".join(e.options), **e.facts}
        for e in TOKENIZERS.all().values()
    ]
    families = sorted({row["family"] for row in rows if "family" in row})
    for what, given, known in [("column", name, ["model", *FACTS]) for name in (*columns, sort)] + [
        ("family", family, families)
    ]:
        if given and given not in known:
            raise InputError(f'list models: unknown {what} "{given}"; {suggest(given, known)}')
    rows = [row for row in rows if not family or row.get("family") == family]
    if sort:
        rows.sort(key=lambda row: (row.get(sort) is None, row.get(sort)))
    return [{name: row.get(name) for name in ("model", *(columns or SHOWN))} for row in rows]


def packages() -> set[str]:
    """Top-level packages that registered tokenizers come from: whose code a model's numbers depend on."""
    return {entry.factory.__module__.partition(".")[0] for entry in TOKENIZERS.all().values()}


def parse(spec: str) -> Spec:
    """Read a spec strictly: InputError for an unknown name, an unknown or ill-typed option, a missing file."""
    spec = spec.strip()
    alias, text = None, spec
    if found := re.match(r"([^@:+/\\=]+)=(.*)", spec):
        alias, text = found.groups()
        if not ROW_NAME.fullmatch(alias):
            raise InputError(
                f'model "{spec}": the name "{alias}" may hold only a-z 0-9 . _ -, and begins with none of . -'
            )
    if not text:
        raise InputError(f'model "{spec}": empty; write for example NAME or NAME@key=value')
    texts = [text] if "+" not in text or Path(text).exists() else text.split("+")
    if len(texts) > 2 or not all(texts):
        raise InputError(f"model \"{spec}\": A+B takes exactly two models, an encoder's and a decoder's")
    parts = tuple(_parse_part(part) for part in texts)
    return Spec(alias or slug("-".join(part.name for part in parts)), text, parts, alias is not None)


def parse_all(text: str) -> list[Spec]:
    """The specs of a comma-separated list, in which a text file stands for the specs in it, one a line.

    What is named twice is taken once; two of one name get numbers, and a note. InputError for an empty list.
    """
    specs: list[Spec] = []
    for one in _listed(text):
        spec = parse(one)
        if any((spec.row, spec.text) == (other.row, other.text) for other in specs):
            continue
        row = numbered(spec.row, [other.row for other in specs])
        if row != spec.row:
            say(f"{spec.text} is called {row}: another is {spec.row} (NAME=SPEC names a row)")
            spec = replace(spec, row=row, given=True)
        specs.append(spec)
    if not specs:
        raise InputError("no model given; see `tokbench list models`")
    return specs


def _listed(text: str) -> list[str]:
    """The specs of a list, those of its files in their place; # begins a remark."""
    found = []
    for one in filter(None, map(str.strip, text.split(","))):
        if one.endswith(".txt") and Path(one).is_file():
            lines = (line.partition("#")[0].strip() for line in Path(one).read_text(encoding="utf-8").splitlines())
            found += [spec for line in filter(None, lines) for spec in _listed(line)]
        else:
            found.append(one)
    return found


def numbered(name: str, taken: Sequence[str]) -> str:
    """The name, with a number behind it if it is taken."""
    names = (name if number == 1 else f"{name}-{number}" for number in itertools.count(1))
    return next(one for one in names if one not in taken)


def row_name(spec: str) -> str:
    """The name of a spec's row in every table, as long as the model does not say its own.

    Its alias; or what is named, and the options: of a file or folder its own name and no path.
    """
    return parse(spec).row


def create(spec: str | Spec, *, random_weights: bool = False) -> "Tokenizer":
    """Build the tokenizer of a spec, named after its row or, from file.py, as its `info` says; weights on the CPU.

    `random_weights` builds without the checkpoint where the entry can. Raises InputError for a wrong spec (also an
    A+B whose latent spaces differ) and CellError when the model does not load.
    """
    spec = parse(spec) if isinstance(spec, str) else spec
    built = [_build(part, random_weights) for part in spec.parts]
    if len(built) == 2:
        from tokbench.tokenizer import Joined

        tokenizer: Tokenizer = Joined(built[0], built[1])
    else:
        tokenizer = built[0]
    row, own = spec.row, slug(tokenizer.info.name)
    if ".py:" in spec.text and not spec.given and len(built) == 1 and own != "unnamed":
        row = slug("-".join([own, *re.split(r"@(?=\w+=)", spec.text)[1:]]))
    tokenizer.info = replace(tokenizer.info, name=row)
    return tokenizer


def _build(part: Part, random_weights: bool) -> Any:
    options = dict(part.options)
    if random_weights and "random_weights" in part.entry.options:
        options["random_weights"] = True
    try:
        made = part.entry.factory(**options)
    except LOAD_ERRORS as error:
        raise CellError(f"{part.text}: does not load: {first_line(error)}{place(error)}") from error
    if missing := [name for name in NEEDED if not hasattr(made, name)]:
        raise CellError(f"{part.text}: {type(made).__name__} is no tokenizer, it lacks {', '.join(missing)}")
    if part.tiling:
        from tokbench.runtime.tiling import Tiled

        return Tiled(made, **part.tiling)
    return made


def _parse_part(text: str) -> Part:
    if Path(text).exists():
        head, given = text, []
    else:
        head, *given = re.split(r"@(?=\w+=)", text)
    texts: dict[str, str] = {}
    for option in given:
        key, value = option.split("=", 1)
        if key in texts:
            raise InputError(f'model "{text}": option {key} is given twice')
        texts[key] = value
    tiling = {key: parse_value(texts.pop(key), int, f'model "{text}": option {key}') for key in TILING if key in texts}
    if tiling and "tile" not in tiling:
        raise InputError(f'model "{text}": overlap is that of tiles; add @tile=512')
    entry, found = _find_entry(head, text)
    if twice := set(found) & set(texts):
        raise InputError(f'model "{text}": option {min(twice)} is given twice')
    name = "-".join([_own_name(head, entry), *given])
    return Part(text, name, entry, _typed(entry, {**found, **texts}, text), tiling)


def _own_name(head: str, entry: Entry) -> str:
    """A spec without its options as a name: of a function or class, a file or a folder its own, without the path."""
    if ".py:" in head:
        return entry.name
    name, _, rest = head.partition(":") if not Path(head).exists() else ("", "", head)
    if not Path(rest).exists() or not rest:
        return head
    path = Path(rest).resolve()
    own = path.name if path.is_dir() else path.parent.name if path.stem in UNTOLD else path.stem
    return f"{name}-{own}" if name else own


def _find_entry(head: str, text: str) -> tuple[Entry, dict[str, str]]:
    """The entry that a spec's head means, and the options that the head itself gives."""
    known = TOKENIZERS.all()
    # Fewest placeholders first: an exact name wins over a pattern that happens to fit.
    for entry in sorted(known.values(), key=lambda entry: entry.name.count("{")):
        if (found := entry.match(head)) is not None:
            return entry, found
    name, _, rest = head.partition(":")
    if ".py:" in head:
        return _entry_from_source(head, text), {}
    if rest and name in known:
        if "file" not in known[name].options:
            raise InputError(f'model "{text}": {name} takes no file')
        return known[name], {"file": rest}
    for path in (Path(head), Path(*head.rsplit(":", 1))):  # PATH, or PATH:SUBFOLDER as of the hub
        if path.exists():
            return _entry_for_file(path, text), {"file": str(path)}
    if "/" in head or "\\" in head or head.endswith(".safetensors"):
        raise InputError(f'model "{text}": no such file or folder: {head}')
    return TOKENIZERS.find(head), {}  # which says what is alike


def _entry_from_source(head: str, text: str) -> Entry:
    """The entry of `file.py:factory`: the file is run as a module of its own."""
    file, _, attribute = head.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise InputError(f'model "{text}": no such file: {file}')
    own = zlib.crc32(str(path.resolve()).encode())  # two files may have one name
    module_spec = importlib.util.spec_from_file_location(f"tokbench_model_{path.stem}_{own:08x}", path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # found again when its source is hashed
    sys.path += [folder for folder in [str(path.resolve().parent)] if folder not in sys.path]  # what lies beside it
    try:
        module_spec.loader.exec_module(module)
    except (SyntaxError, *LOAD_ERRORS) as error:
        raise InputError(f'model "{text}": {file} does not run: {first_line(error)}{place(error)}') from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        raise InputError(f'model "{text}": {file} has no function "{attribute}"')
    return Entry(attribute, factory, f"{file}:{attribute}")


def _entry_for_file(path: Path, text: str) -> Entry:
    """The entry that opens a bare file or folder: its own metadata names it, or an entry accepts it."""
    known = TOKENIZERS.all()
    if path.suffix == ".safetensors":
        entry = known.get(str(read_header(path)[1].get("model")))
        if entry is not None and "file" in entry.options:
            return entry
    for entry in known.values():
        if entry.accepts is not None and entry.accepts(path):
            return entry
    how = f"{path}:FUNCTION" if path.suffix == ".py" else f"NAME:{path}"
    raise InputError(f'model "{text}": {path} says nowhere which model it is; write {how}')


def _typed(entry: Entry, texts: Mapping[str, str], text: str) -> dict[str, Any]:
    options = entry.options
    values = {}
    for key, value in texts.items():
        if key not in options:
            raise InputError(f'model "{text}": unknown option "{key}"; {suggest(key, [*options, *TILING])}')
        annotation = options[key][0]
        where = f'model "{text}": option {key}'
        values[key] = (
            _literal(value) if annotation is inspect.Parameter.empty else parse_value(value, annotation, where)
        )
        if isinstance(values[key], Path) and not values[key].exists():
            raise InputError(f'model "{text}": option {key}: no such file or folder: {value}')
    for key, (_, default) in options.items():
        if default is inspect.Parameter.empty and key not in values:
            raise InputError(f'model "{text}": option {key} is needed: {entry.name}@{key}=...')
    return values


def _literal(text: str) -> Any:
    """A value whose type nobody says: a Python literal (also true, false, none), else the text."""
    try:
        return ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(text.lower(), text))
    except (ValueError, SyntaxError):
        return text


def describe_model(spec: str) -> list[str]:
    """A model's facts and its options with their types and defaults, a line each."""
    lines = []
    for part in parse(spec).parts:
        known = {"about": part.entry.summary, **part.entry.facts}
        lines += [part.entry.name, *(f"  {key:<10} {value}" for key, value in known.items() if value is not None)]
        for key, (kind, default) in part.entry.options.items():
            typed = kind is not inspect.Parameter.empty
            shown = re.sub(r"\b[a-z]\w*\.", "", inspect.formatannotation(kind)) if typed else "any"
            value = " (needed)" if default is inspect.Parameter.empty else f" = {default}"
            lines.append(f"  @{key}: {shown}{value}")
    return lines


# ---- trainers -----------------------------------------------------------------------------------------------------


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


class Trainer(Protocol):
    """What trains one kind of model; a module with these two functions is one. Both raise InputError for options that
    they do not know."""

    def configure(self, options: TrainOptions) -> Any:
        """The settings that options name, a frozen dataclass, before any key=value."""

    def train(self, config: Any, options: TrainOptions) -> Path:
        """Train by these settings and return the file of the finished model."""


TRAINERS: Names[tuple[Callable[[], Trainer], str]] = Names("model to train")  # with a summary


def register_trainer(name: str, load: Callable[[], Trainer], *, summary: str) -> None:
    """Make `tokbench train NAME` known; a plugin's `register` calls it. Heavy imports belong inside `load`.

    ValueError for a second use of a name.
    """
    TRAINERS.add(name, (load, summary))


def train_model(name: str, options: TrainOptions) -> Path:
    """Train and return the finished file. Raises InputError for a missing --data or for an --out that is missing or
    cannot be written, before anything is fetched or built."""
    load, _ = TRAINERS.find(name)
    if not options.data or options.out == Path():
        raise InputError(f"train {name}: --data DIR and --out DIR are needed")
    existing = next(place for place in (options.out, *options.out.absolute().parents) if place.exists())
    with writable(options.out):
        tempfile.TemporaryFile(dir=existing).close()
    trainer = load()
    return trainer.train(override(trainer.configure(options), options.settings), options)


def train_help(name: str | None, stage: str | None, preset: str | None) -> str:
    """What can be trained, or every setting of one of them as key=value."""
    if name is None:
        return "\n".join(["Models:", *(f"  {known:<8} {about}" for known, (_, about) in TRAINERS.all().items())])
    load, _ = TRAINERS.find(name)
    config = load().configure(TrainOptions("", Path(), stage, preset))
    which = " ".join(f"{what} {given}" for what, given in (("stage", stage), ("preset", preset)) if given)
    return "\n  ".join([f"Settings of {name} {which}".rstrip() + ":", *describe(config)])


def choose(known: Mapping[str, T], name: str | None, what: str, default: str) -> T:
    """What is known by this name, or by the default for None; InputError naming all choices if nothing is."""
    if name is not None and name not in known:
        raise InputError(f'unknown {what} "{name}"; known: {", ".join(known)}')
    return known[name or default]


# ---- data sources and probes --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataSource:
    """`open` takes REST of `--data NAME:REST` ("" for NAME alone) and --split, and gives a `tokbench.Source`.

    It raises InputError where there is none.
    """

    open: Callable[[str, str | None], Any]
    summary: str


@dataclass(frozen=True)
class Probe:
    """`measure` takes a `Look` and a `Base` (`evaluation.probes.look`) and gives, by name, columns [B] of the metrics
    whose `probe` is this one; features by ("fake", extractor).

    `refuses` takes a `TokenizerInfo` and says why a tokenizer cannot have some of them, by metric.
    """

    measure: Callable[..., Mapping[Any, Any]]
    summary: str
    encodings: float = 0.0  # of the set, beyond the reconstruction that all probes share
    decodings: float = 0.0
    refuses: Callable[[Any], Mapping[str, str]] = lambda _: {}
    boxes: str = ""  # the kind of annotated boxes that images need; "": any images will do


SOURCES: Names[DataSource] = Names("data source")
PROBES: Names[Probe] = Names("probe")


def register_source(name: str, open: Callable[[str, str | None], Any], *, summary: str) -> None:
    """Make `--data NAME` and `--data NAME:REST` known; a plugin's `register` calls it. ValueError for a taken name."""
    SOURCES.add(name, DataSource(open, summary))


def register_probe(name: str, measure: Callable[..., Mapping[Any, Any]], *, summary: str, **more: Any) -> None:
    """Make `tokbench probe NAME` known; a plugin's `register` calls it, and `register_metric` for what it gives.

    `more` are the other fields of `Probe`. ValueError for a taken name.
    """
    PROBES.add(name, Probe(measure, summary, **more))
