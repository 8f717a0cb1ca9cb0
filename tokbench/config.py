"""Configs are frozen dataclasses; strict `key=value` texts change them. Never imports torch."""

import contextlib
import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from tokbench.errors import InputError

C = TypeVar("C")
_type_hints = functools.cache(typing.get_type_hints)  # a folder of thousands of records asks for the same few


def parse_value(text: str, annotation: Any, key: str) -> Any:
    """`text` as the annotated type: int, float, bool, str, Path, Literal, a tuple of them, or one of these or None.

    Raises InputError naming `key`, the text and what is expected.
    """
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        if text.lower() in ("none", "auto") and type(None) in args:
            return None
        if any(text in typing.get_args(arg) for arg in args if typing.get_origin(arg) is typing.Literal):
            return text  # `int | Literal["auto"]`
        return parse_value(text, next(arg for arg in args if arg is not type(None)), key)
    if origin is typing.Literal:
        if text in (by_text := {str(arg): arg for arg in args}):
            return by_text[text]
        raise InputError(f"{key}={text}: expected one of {', '.join(by_text)}")
    if origin is tuple:
        return tuple(parse_value(part.strip(), args[0], key) for part in text.split(",") if part.strip())
    if annotation is bool:
        if text.lower() in ("true", "false", "1", "0"):
            return text.lower() in ("true", "1")
        raise InputError(f"{key}={text}: expected true or false")
    if annotation not in (int, float, str, Path):
        raise InputError(f"{key} cannot be set by key=value")
    try:
        return annotation(text)
    except ValueError:
        raise InputError(f"{key}={text}: expected {annotation.__name__}") from None


def positive_numbers(text: str, option: str) -> tuple[int, ...]:
    """`128,256` -> (128, 256); InputError naming the option for anything but positive whole numbers."""
    numbers: tuple[int, ...] = parse_value(text, tuple[int, ...], option)
    if not numbers or min(numbers) < 1:
        raise InputError(f"{option}={text}: expected positive whole numbers, comma-separated")
    return numbers


def override(config: C, pairs: Iterable[str]) -> C:
    """The config with each `key=value` applied in order; a dot reaches into a nested config (`gan.weight=0`).

    Raises InputError for a text without '=', an unknown key (near matches are named), a value of another type or one
    that the config itself refuses with a ValueError.
    """
    for pair in pairs:
        key, separator, text = pair.partition("=")
        if not separator:
            raise InputError(f"{pair!r}: expected key=value")
        config = _set(config, key, key, text)
    return config


def _set(config: C, path: str, key: str, text: str) -> C:
    head, _, rest = path.partition(".")
    annotations = _type_hints(type(config))  # type: ignore[arg-type]
    if head not in annotations:
        near = difflib.get_close_matches(head, annotations, n=3) or sorted(annotations)
        raise InputError(f"unknown setting {key!r}; did you mean {', '.join(near)}?")
    inner = getattr(config, head)
    if dataclasses.is_dataclass(inner) != bool(rest):
        raise InputError(f"{key}: " + ("not a group of settings" if rest else f"a group; set {head}.NAME=value"))
    value = _set(inner, rest, key, text) if rest else parse_value(text, annotations[head], key)
    try:
        return dataclasses.replace(config, **{head: value})  # type: ignore[type-var]
    except ValueError as error:
        raise InputError(f"{key}: {error}") from error


def to_dict(config: Any) -> dict[str, Any]:
    """The config as JSON-ready values: paths as text, tuples as lists, nested configs as dicts."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config) if field.init}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def from_dict(cls: type[C], values: Mapping[str, Any], where: str = "") -> C:
    """The inverse of to_dict. Raises InputError for keys that `cls` does not have and for values of other types, named
    after `where`."""
    annotations = _type_hints(cls)  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(annotations))
    if unknown:
        raise InputError(f"{cls.__name__}: unknown setting {', '.join(unknown)}")
    return cls(**{key: _typed(value, annotations[key], f"{where}{key}") for key, value in values.items()})


def _typed(value: Any, annotation: Any, key: str) -> Any:
    """A value that JSON holds as its annotation wants it; InputError naming the key if it is of another type."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        kinds = [kind for kind in args if kind is not types.NoneType]
        if value is None and len(kinds) < len(args):
            return None
        for kind in kinds[:-1]:
            with contextlib.suppress(InputError):
                return _typed(value, kind, key)
        return _typed(value, kinds[-1], key)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_typed(item, args[0], key) for item in value)
    if isinstance(value, Mapping) and origin is Mapping:
        return {name: _typed(item, args[1], f"{key}.{name}") for name, item in value.items()}
    if isinstance(value, Mapping) and dataclasses.is_dataclass(annotation):
        return from_dict(typing.cast(type, annotation), value, f"{key}.")
    if isinstance(value, str) and annotation is Path:
        return Path(value)
    plain = (int, float) if annotation is float else (annotation,)
    if annotation is Any or (value in args if origin is typing.Literal else type(value) in plain):
        return value
    raise InputError(f"{key}: {repr(value)[:60]} is no {getattr(annotation, '__name__', annotation)}")


def describe(config: Any, prefix: str = "") -> list[str]:
    """A `key=value` line per setting, nested ones with their dotted key: what --help prints and override reads."""
    lines = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            lines += describe(value, f"{prefix}{field.name}.")
        else:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else value
            lines.append(f"{prefix}{field.name}={text}")
    return lines
