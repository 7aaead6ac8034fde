"""The catalog: which methods exist, read from the folders of the families and from plug-ins.

A module without a leading underscore in a family's folder is a method; its file name is the slug with underscores.
A method of somebody else's package joins through the entry point group ``tokenmill.methods``: the entry's name is
``<family>.<slug>`` and its value is the module. Cards are plain data and are read from the source without running it,
so that listing methods imports neither them nor torch.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args

from .errors import LimitError, UnsupportedError, unknown_name

ROOT = Path(__file__).parent
GROUP = "tokenmill.methods"
FAMILIES = (
    "text",
    "codes",
    "prune",
    "attend",
    "decode",
    "diffuse",
    "retrieve",
    "recommend",
    "curate",
    "steer",
    "probe",
)
Kind = Literal[
    "decoder",
    "selector",
    "attention",
    "rule",
    "policy",
    "tokenizer",
    "model",
    "quantizer",
    "trainer",
    "pipeline",
    "benchmark",
]
KINDS: tuple[str, ...] = get_args(Kind)


@dataclass(frozen=True, slots=True, kw_only=True)
class Paper:
    """Where a method comes from: title, date as year-month(-day), arXiv number, address of the authors' code."""

    title: str
    date: str
    arxiv: str = ""
    code: str = ""

    @property
    def url(self) -> str:
        """Address of the abstract, or an empty string when the paper is not on arXiv."""
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reported:
    """A number that the paper itself reports, with the setting that it belongs to."""

    table: str
    setting: str
    metric: str
    value: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What a method is, as plain data; laws, command line and docs read it and nobody retypes it.

    Attributes:
        name: how people call the method.
        kind: what it does; laws are chosen by it.
        paper: where it comes from.
        summary: two sentences of our own.
        claim: what it promises, with the conditions under which it does.
        api: public names, the main one first; all of them are exported from the family's package.
        exact: the output follows the same law as the untouched model's.
        trains: something is trained before it can be used.
        needs: what a caller has to bring ("draft_model", "vision_tokens", ...).
        works_with: model types on which it is tested ("llama", "gemma3_text", ...).
        task: the bench task that measures it.
        differs: where we depart from the paper, and why.
        reported: numbers of the paper.
        batch_coupled: rows of a batch influence each other by design.
        licence: of the code in this method's module.
        slug: the file's name with hyphens; filled in by the catalog.
        family: the folder; filled in by the catalog.
    """

    name: str
    kind: Kind
    paper: Paper
    summary: str
    claim: str
    api: tuple[str, ...]
    exact: bool
    trains: bool
    task: str
    needs: frozenset[str] = frozenset()
    works_with: tuple[str, ...] = ()
    differs: tuple[str, ...] = ()
    reported: tuple[Reported, ...] | Reported | None = None
    batch_coupled: bool = False
    licence: str = "Apache-2.0"
    slug: str = ""
    family: str = ""


@dataclass(frozen=True, slots=True)
class Entry:
    """One method of the catalog before anything of it is loaded. `origin` is the distribution it ships in."""

    slug: str
    family: str
    module: str
    origin: str
    file: Path | None = None


def entries() -> dict[str, Entry]:
    """Slug -> entry, families in order, then plug-ins. Reads names only and imports no method.

    Raises:
        LimitError: when a plug-in's name is not ``<family>.<slug>`` or takes a slug that is already there.
    """
    found: dict[str, Entry] = {}
    for family in FAMILIES:
        for file in sorted((ROOT / family).glob("[a-z]*")):
            source = file / "__init__.py" if file.is_dir() else file
            if source.suffix == ".py" and source.is_file():
                slug = file.stem.replace("_", "-")
                found[slug] = Entry(slug, family, f"{__package__}.{family}.{file.stem}", "tokenmill", source)
    for plugin in _plugins():
        if plugin.family not in FAMILIES or not plugin.slug:
            name = f"{plugin.family}.{plugin.slug}" if plugin.family else plugin.slug
            limit = f"'<family>.<slug>' with a family of {', '.join(FAMILIES)}"
            raise LimitError(plugin.origin, "entry point", name, limit)
        if plugin.slug in found:
            taken = f"a new slug, and {found[plugin.slug].origin} has this one"
            raise LimitError(plugin.origin, "entry point", plugin.slug, taken)
        found[plugin.slug] = plugin
    return found


def _plugins() -> list[Entry]:
    from importlib.metadata import entry_points  # a slow import that only listing needs

    found = {}
    for point in entry_points(group=GROUP):
        family, _, slug = point.name.rpartition(".")
        origin = point.dist.name if point.dist is not None else point.value
        # A distribution that lies on the path twice (an editable install does) is one plug-in.
        found[point.name, point.value] = Entry(slug.replace("_", "-"), family, point.module, origin)
    return list(found.values())


def paths() -> dict[str, str]:
    """Slug -> module name of every method."""
    return {slug: entry.module for slug, entry in entries().items()}


def entry(slug: str) -> Entry:
    """The entry of one method; underscores in the slug are read as hyphens.

    Raises:
        LimitError: for a name that is not in the catalog, with the nearest names.
    """
    known = entries()
    if (wanted := slug.replace("_", "-")) not in known:
        raise unknown_name("catalog", "method", slug, known)
    return known[wanted]


def load(slug: str) -> ModuleType:
    """Import the module of one method. A broken import stays a broken import."""
    return importlib.import_module(entry(slug).module)


def card(slug: str) -> Card:
    """The card of one method, with slug and family filled in."""
    return _card(entry(slug))


def cards(family: str | None = None) -> list[Card]:
    """The cards of all methods, or of one family, in the order of the catalog."""
    if family is not None and family not in FAMILIES:
        raise unknown_name("catalog", "family", family, FAMILIES)
    return [_card(e) for e in entries().values() if family in (None, e.family)]


def method(slug: str) -> Any:
    """The main public object of a method: the first name of its card's `api`."""
    return getattr(load(slug), card(slug).api[0])


def _card(of: Entry) -> Card:
    source = of.file
    if source is None:
        import importlib.util

        spec = importlib.util.find_spec(of.module)
        if spec is None or spec.origin is None:
            raise UnsupportedError(of.origin, f"the module {of.module} of the method {of.slug!r} cannot be found")
        source = Path(spec.origin)
    read = _read_card(source, source.stat().st_mtime_ns)
    return replace(read, slug=of.slug, family=of.family)


@lru_cache(maxsize=256)
def _read_card(source: Path, _changed: int) -> Card:
    """Build the card from the assignment ``CARD = Card(...)`` in a file, without running the file."""
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names = [t.id for t in targets if isinstance(t, ast.Name)]
        if isinstance(node, ast.Assign | ast.AnnAssign) and names == ["CARD"] and node.value is not None:
            value = _plain(node.value, source)
            if isinstance(value, Card):
                return value
    raise UnsupportedError(source.name, "there is no CARD = Card(...) in this module", "Every method has a card.")


def _plain(node: ast.expr, source: Path) -> Any:
    """The value of an expression that is plain data: literals, and calls of Card, Paper, Reported, frozenset."""
    makers: dict[str, Callable[..., Any]] = {"Card": Card, "Paper": Paper, "Reported": Reported, "frozenset": frozenset}
    if isinstance(node, ast.Call):
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        if name in makers and all(k.arg for k in node.keywords):
            return makers[name](
                *(_plain(a, source) for a in node.args), **{str(k.arg): _plain(k.value, source) for k in node.keywords}
            )
    elif isinstance(node, ast.Tuple):
        return tuple(_plain(item, source) for item in node.elts)
    else:
        try:
            return ast.literal_eval(node)
        except ValueError:
            pass  # not a literal: said below, with the line
    raise UnsupportedError(
        f"{source.name}:{node.lineno}",
        f"CARD holds {ast.unparse(node)!r}, which is not plain data",
        "Write the value itself; the catalog reads cards without running the module.",
    )


def lazy(package: str, names: Mapping[str, str] | None = None) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__, __dir__ = lazy(__name__, {...})``: the public names of a package, loaded on first use.

    In a family's package the `api` names of its methods' cards are found by themselves, so that a new method edits no
    shared file; `names` adds what the family shares, as ``{"TreeTemplate": "_tree"}`` (name -> submodule). Submodules
    are attributes as well.
    """
    extra = dict(names or {})
    parent, _, family = package.rpartition(".")
    is_family = parent == __package__ and family in FAMILIES

    def table() -> dict[str, str]:
        found: dict[str, str] = {}
        for of in entries().values() if is_family else ():
            if of.family == family and of.origin == "tokenmill":
                for name in _card(of).api:
                    if found.setdefault(name, of.module) != of.module:
                        raise LimitError(of.module, "api", name, f"a new name, and {found[name]} exports this one")
        return found | {name: f"{package}.{module}" for name, module in extra.items()}

    def get(name: str) -> Any:
        module = None if name.startswith("__") else table().get(name)
        if module is not None:
            return getattr(importlib.import_module(module), name)
        if name in submodules():
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def submodules() -> set[str]:
        folders = [Path(folder) for folder in importlib.import_module(package).__path__]
        files = [
            *(f for d in folders for f in d.glob("[a-z]*.py")),
            *(f for d in folders for f in d.glob("[a-z]*/__init__.py")),
        ]
        return {file.parent.name if file.stem == "__init__" else file.stem for file in files}

    def names_of() -> list[str]:
        return sorted({*table(), *submodules()})

    return get, names_of
