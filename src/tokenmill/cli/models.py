"""``tokenmill models``: the models that come along."""

from __future__ import annotations

import typer

from ._output import Json, print_json, print_table


def register(app: typer.Typer) -> None:
    app.command("models")(command)


def command(as_json: Json = False) -> None:
    """List the embedded models: size, licence, and whether they are ready in the cache.

    Any transformers id and any local folder works in the place of these names.

    Example: [bold]tokenmill models --json[/bold]
    """
    from tokenmill import models

    facts = [{"name": name, **models.info(name)} for name in models.names()]
    if as_json:
        print_json(facts)
        return
    rows = []
    for fact in facts:
        ready = ", ".join(fact["cached"]) if fact.get("cached") else ("ships" if fact["kind"] == "asset" else "no")
        millions = f"{fact['parameters'] / 1e6:.1f} M" if isinstance(fact.get("parameters"), int) else ""
        rows.append((fact["name"], millions, str(fact.get("weights", "")), str(fact.get("licence", "")), ready))
    print_table(("model", "parameters", "weights", "licence", "in the cache"), rows, right=("parameters",))
