"""``tokenmill check``: the laws, the card and the page of a method."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from tokenmill import catalog

from ._output import Json, console, print_json

if TYPE_CHECKING:
    from tokenmill import laws

_MARKS = {"ok": "[green]ok[/green]", "broken": "[red]broken[/red]", "does not apply": "[dim]does not apply[/dim]"}


def register(app: typer.Typer) -> None:
    app.command("check")(command)


def command(
    slug: Annotated[str | None, typer.Argument(metavar="[SLUG]", help="The method; all of them without it.")] = None,
    as_json: Json = False,
) -> None:
    """Put a method under the laws of its kind, and look for its page; for methods of plug-ins too.

    Example: [bold]tokenmill check token-recycling[/bold]
    """
    known = [catalog.entry(slug).slug] if slug is not None else list(catalog.paths())
    from tokenmill import laws

    found: list[laws.Result] = []
    for name in known:
        if not as_json:
            console().print(f"[bold]{name}[/bold]")
        for result in (*laws.each(name), page(name)):
            found.append(result)
            if not as_json:
                note = f"  {escape(result.message)}" if result.message else ""
                console().print(f"  {_MARKS[result.status]}  {result.law}{note}")
    if as_json:
        print_json([{"slug": r.slug, "law": r.law, "status": r.status, "message": r.message} for r in found])
    if any(result.status == "broken" for result in found):
        raise typer.Exit(1)


def page(slug: str) -> laws.Result:
    """Whether the docs have a page for the method. Only a checkout has docs, and a plug-in has its own."""
    from tokenmill import laws

    docs = Path(__file__).parents[3] / "docs" / "methods"
    law = "docs page exists"
    if catalog.entry(slug).origin != "tokenmill":
        return laws.Result(slug, law, "does not apply", "a plug-in is documented by its own package")
    if not docs.is_dir():
        return laws.Result(slug, law, "does not apply", "the docs are not installed with the package")
    if not (docs / f"{slug}.md").is_file():
        return laws.Result(slug, law, "broken", f"there is no docs/methods/{slug}.md")
    return laws.Result(slug, law, "ok")
