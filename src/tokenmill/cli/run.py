"""``tokenmill run``: a method on your own input, beside the untouched model."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from tokenmill import catalog, settings
from tokenmill.errors import LimitError, UnsupportedError

from . import _constrained, _pictured
from ._output import Json, Slug, console, print_json, print_table, quiet_loading
from ._run_command import RunCommand, own_commands

_DTYPES = ("float32", "bfloat16")


def register(app: typer.Typer) -> None:
    others = ", ".join(own_commands())
    epilog = (
        f"Methods with options of their own: {others}. tokenmill run {others.split(', ')[0]} --help" if others else None
    )
    app.command("run", cls=RunCommand, epilog=epilog)(command)


def command(
    slug: Slug,
    prompt: Annotated[str | None, typer.Option(help="The text to continue.")] = None,
    file: Annotated[Path | None, typer.Option(help="A file with the text to continue; - reads the input.")] = None,
    model: Annotated[str, typer.Option(help="An embedded model, a folder, or a transformers id.")] = "gemma-3-270m",
    draft: Annotated[str, typer.Option(help="The model that drafts, for methods that need one.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to produce at most.")] = 96,
    sample: Annotated[bool, typer.Option("--sample", help="Sample instead of taking the likeliest token.")] = False,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    dtype: Annotated[str, typer.Option(help=f"Dtype of the weights: {', '.join(_DTYPES)}.")] = "bfloat16",
    packed: Annotated[bool, typer.Option(help="Prepack the linear layers.")] = True,
    regex: Annotated[str | None, typer.Option(help="Constraint: a regular expression that the text matches.")] = None,
    json_schema: Annotated[str | None, typer.Option(help="Constraint: a JSON Schema, as text or a file.")] = None,
    grammar: Annotated[Path | None, typer.Option(help="Constraint: a file with a Lark grammar.")] = None,
    predicate: Annotated[
        str | None, typer.Option(metavar="MODULE:FUNCTION", help="Constraint: a function from text to bool.")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="A picture, for methods that drop visual tokens.")] = None,
    question: Annotated[str | None, typer.Option(help="What to ask about the picture.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the picture with dimmed patches goes (PNG).")] = None,
    python: Annotated[bool, typer.Option("--python", help="Constraint: Python source that compiles.")] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting; `tokenmill show` lists them.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Generate with a method, then without it, and show what it saved.

    Example: [bold]tokenmill run token-recycling --prompt "def quicksort(values):" --set tree=auto[/bold]

    Under a constraint: [bold]tokenmill run awrs --regex "[0-9]{4}" --prompt "Rome fell in the year "[/bold]

    About a picture: [bold]tokenmill run divprune --image photo.png --question "..." --model MODEL[/bold]
    """
    card = catalog.card(slug)
    if card.task == "vqa":
        values = settings.from_text(card.slug, catalog.method(card.slug), pairs(set_ or []))
        _pictured.run(
            card, values, _pictured.Asked(model, dtype, image, question, out, max_new_tokens), as_json=as_json
        )
        return
    if card.kind != "decoder":
        raise UnsupportedError("run", f"{card.slug} is a {card.kind} and has no command")
    _check_dtype(dtype)
    if "draft_model" in card.needs and not draft:
        raise typer.BadParameter(f"{card.slug} needs a draft model; give one with --draft")
    values = settings.from_text(card.slug, catalog.method(card.slug), pairs(set_ or []))
    text = _text(prompt, file)
    asked = _constrained.Constraint(regex, json_schema, grammar, predicate, python)
    if "constraint" in card.needs:
        constraint = asked.build(card.slug)
        quiet_loading()
        side = _constrained.Side(model, dtype, packed, max_new_tokens, seed)
        _constrained.run(card, values, constraint, text, side, as_json=as_json)
        return
    if asked.given:
        raise typer.BadParameter(f"{card.slug} takes no constraint, got {', '.join(asked.given)}")
    quiet_loading()
    runs = _Side(model, draft, dtype, packed, max_new_tokens, sample, seed)
    _report(card, runs.both(card, values, text, quiet=as_json), as_json)


def _check_dtype(dtype: str) -> None:
    if dtype not in _DTYPES:
        raise LimitError("run", "dtype", dtype, f"one of {', '.join(_DTYPES)}")


def pairs(written: list[str]) -> dict[str, str]:
    """What ``--set`` was given, by key."""
    pairs: dict[str, str] = {}
    for text in written:
        key, found, value = text.partition("=")
        if not (key and found):
            raise typer.BadParameter(f"--set takes KEY=VALUE, not {text!r}")
        pairs[key] = value
    return pairs


def _text(prompt: str | None, file: Path | None) -> str:
    if (prompt is None) == (file is None):
        raise typer.BadParameter("give either --prompt or --file")
    if file is None:
        return str(prompt)
    if str(file) == "-":
        return sys.stdin.read()
    if not file.is_file():
        raise typer.BadParameter(f"there is no file {file}")
    return file.read_text(encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Run:
    """One side of the comparison."""

    who: str
    tokens: list[int]
    text: str
    ms: float
    counts: dict[str, float]


@dataclass(frozen=True, slots=True)
class _Side:
    """Runs a text through a model with a method and without it."""

    model: str
    draft: str
    dtype: str
    packed: bool
    new_tokens: int
    sample: bool
    seed: int

    def both(self, card: catalog.Card, values: dict[str, Any], text: str, *, quiet: bool) -> list[Run]:
        """The method, streamed to the terminal unless quiet, and plain."""
        from transformers import TextStreamer

        from tokenmill import models
        from tokenmill.bench.measure import timed
        from tokenmill.bench.task import Item
        from tokenmill.bench.tasks._generation import Subject

        main = catalog.method(card.slug)
        first: list[Any] = []
        if "draft_model" in card.needs:
            first = [models.load(self.draft, dtype=self.dtype, packed=self.packed)[0]]
        model, tokenizer = models.load(self.model, dtype=self.dtype, packed=self.packed)
        if "tokenizer" in card.needs:
            first.append(tokenizer)
        decoder = main(*first, **values)
        item = Item("input", "text", tokenizer(text)["input_ids"])
        runs = []
        for who, how in (("method", decoder), ("plain", None)):
            subject = Subject(model, how, {}, new_tokens=self.new_tokens, sample=self.sample, seed=self.seed)
            subject.warm_up(item)
            if how is not None and not quiet:
                streamer = TextStreamer(tokenizer, skip_prompt=True)  # pyright: ignore[reportArgumentType]
                subject.arguments["token_streamer"] = streamer
            ms, outcome = timed(lambda s=subject: s.run(item))
            runs.append(Run(who, outcome.output, str(tokenizer.decode(outcome.output)), ms, dict(outcome.counts)))
        return runs


def _report(card: catalog.Card, runs: list[Run], as_json: bool) -> None:
    ours, plain = runs
    if as_json:
        print_json({r.who: {"tokens": r.tokens, "text": r.text, "ms": r.ms, "counts": r.counts} for r in runs})
        return
    rows = []
    for run in (plain, ours):
        name = card.slug if run is ours else "plain"
        n = len(run.tokens)
        calls = f"{run.counts['model_calls']:.0f}"
        rows.append((name, str(n), calls, f"{run.ms:,.0f}", f"{run.ms / max(n, 1):.1f}", f"{plain.ms / run.ms:.2f}x"))
    console().print()
    heads = ("", "tokens", "model calls", "ms", "ms/token", "speed")
    print_table(heads, rows, right=heads[1:])
    same = len(_agreeing(plain.tokens, ours.tokens))
    said = "the same text" if plain.tokens == ours.tokens else f"the first {same} tokens are the same"
    counts = ", ".join(f"{k} {v:.0f}" for k, v in ours.counts.items() if v and not k.startswith("step_"))
    console().print(f"\n{said}; {escape(counts)}")


def _agreeing(a: list[int], b: list[int]) -> list[int]:
    """The tokens before the first difference."""
    for at, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return a[:at]
    return a[: min(len(a), len(b))]
