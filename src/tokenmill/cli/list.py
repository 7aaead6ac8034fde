"""``tokenmill list``: the methods that there are."""

from __future__ import annotations

from typing import Annotated

import typer

from tokenmill import catalog

from ._output import Json, card_data, print_json, print_table


def register(app: typer.Typer) -> None:
    app.command("list")(command)


def command(
    family: Annotated[str | None, typer.Option(help="Only this family.")] = None,
    as_json: Json = False,
) -> None:
    """List the methods, plug-ins included.

    Example: [bold]tokenmill list --family decode[/bold]
    """
    cards = catalog.cards(family)
    if as_json:
        print_json([card_data(card) for card in cards])
        return
    origin = {slug: entry.origin for slug, entry in catalog.entries().items()}
    rows = [
        (c.slug, c.family, c.kind, c.task, "yes" if c.exact else "no", "yes" if c.trains else "no", origin[c.slug])
        for c in cards
    ]
    print_table(("method", "family", "kind", "task", "exact", "trains", "from"), rows)
