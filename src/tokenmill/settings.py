"""Settings as text: what the command line, method specs and sweeps write, turned into the fields of a dataclass."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union

from tokenmill.errors import LimitError, unknown_name

_PLAIN = (bool, int, float, str)


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    """One field of a settings class that can be written as text."""

    name: str
    hint: Any
    default: Any
    help: str = ""

    @property
    def choices(self) -> tuple[Any, ...]:
        """The allowed values, when the field lists them."""
        return tuple(c for option in _options(self.hint) if typing.get_origin(option) is Literal for c in _args(option))


def settings_of(cls: Any) -> dict[str, Setting]:
    """The settings of a dataclass (or of a function's keyword-only parameters) that are plain values, by name.

    A field's help is its line under ``Attributes:`` or ``Args:`` in the docstring, so nobody writes it twice.
    """
    hints = hints_of(cls)
    texts = _described(inspect.getdoc(cls) or "")
    if dataclasses.is_dataclass(cls):
        found = [(f.name, f.default) for f in dataclasses.fields(cls) if f.init]
    else:
        parameters = inspect.signature(cls).parameters.values()
        found = [(p.name, p.default) for p in parameters if p.kind is p.KEYWORD_ONLY]
    return {
        name: Setting(name, hints[name], default, texts.get(name, ""))
        for name, default in found
        if name in hints and any(_is_plain(option) for option in _options(hints[name]))
    }


def hints_of(cls: Any) -> dict[str, Any]:
    """The annotations of a class or function; one that names what is imported for type checkers only is left out."""
    written = inspect.get_annotations(cls)
    names = vars(sys.modules[cls.__module__])
    hints: dict[str, Any] = {}
    for name, hint in written.items():
        try:
            hints[name] = eval(hint, names) if isinstance(hint, str) else hint
        except NameError:
            continue
    return hints


def from_text(where: str, cls: Any, written: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for `cls` from written values; values that are not text pass as they are.

    Raises:
        LimitError: for a name that `cls` does not have, or a text that is no value of the field's type.
    """
    known = settings_of(cls)
    values: dict[str, Any] = {}
    for name, value in written.items():
        if (key := name.replace("-", "_")) not in known:
            raise unknown_name(where, "setting", name, known)
        values[key] = _value(where, known[key], value) if isinstance(value, str) else value
    return values


def _value(where: str, setting: Setting, text: str) -> Any:
    options = _options(setting.hint)
    if text.lower() in ("none", "null") and type(None) in options:
        return None
    if setting.choices:
        match = [c for c in setting.choices if str(c) == text]
        if match:
            return match[0]
        if not any(option in _PLAIN for option in options):
            raise unknown_name(where, setting.name, text, map(str, setting.choices))
    if bool in options and text.lower() in ("true", "false"):
        return text.lower() == "true"
    for number in (int, float):
        if number in options:
            try:
                return number(text)
            except ValueError:
                continue  # another type of the field may take it
    if str in options:
        return text
    names = " or ".join(getattr(o, "__name__", str(o)) for o in options if o in _PLAIN or o is type(None))
    raise LimitError(where, setting.name, text, f"a value of type {names}")


def _options(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (Union, types.UnionType):
        return tuple(inner for option in _args(hint) for inner in _options(option))
    return (hint,)


def _args(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint)


def _is_plain(option: Any) -> bool:
    return option in _PLAIN or typing.get_origin(option) is Literal


def _described(doc: str) -> dict[str, str]:
    """Name -> text of the entries under ``Attributes:`` or ``Args:`` of a Google-style docstring."""
    section = re.search(r"^(?:Attributes|Args):\n((?:[ \t]+.*\n?|\n)+)", doc, flags=re.MULTILINE)
    if not section:
        return {}
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", section[1], flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}
