"""``tokenmill show``: the card of a method and its settings."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import typer
from rich.markup import escape

from tokenmill import catalog, settings

from ._output import Json, Slug, card_data, console, print_json, print_table


def register(app: typer.Typer) -> None:
    app.command("show")(command)


def command(slug: Slug, as_json: Json = False) -> None:
    """Show what a method is, what it promises, where it departs from its paper, and its settings.

    Example: [bold]tokenmill show token-recycling[/bold]
    """
    card = catalog.card(slug)
    known = settings.settings_of(catalog.method(slug))
    if as_json:
        plain = {name: {"default": _default(s), "help": s.help} for name, s in known.items()}
        print_json({**card_data(card), "settings": plain})
        return
    out = console()
    out.print(f"[bold]{escape(card.name)}[/bold]  {card.slug}, {card.family}, {card.kind}")
    out.print(escape(f"{card.paper.title} ({card.paper.date}) {card.paper.url}".strip()))
    out.print()
    out.print(escape(card.summary))
    out.print(f"[bold]Claim[/bold]  {escape(card.claim)}")
    facts = {
        "needs": ", ".join(sorted(card.needs)),
        "works with": ", ".join(card.works_with),
        "task": card.task,
        "api": ", ".join(card.api),
        "code": card.paper.code,
        "licence": card.licence,
    }
    for name, value in facts.items():
        if value:
            out.print(f"[bold]{name.capitalize()}[/bold]  {escape(value)}")
    for text in card.differs:
        out.print(f"[bold]Differs[/bold]  {escape(text)}")
    if known:
        out.print()
        rows = [(f"{s.name}", escape(repr(_default(s))), escape(s.help)) for s in known.values()]
        print_table(("setting", "default", "what it is"), rows)


def _default(setting: settings.Setting) -> Any:
    nothing = (dataclasses.MISSING, inspect.Parameter.empty)
    return None if any(setting.default is n for n in nothing) else setting.default
