"""``tokenmill report``: result lines as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._output import console


def register(app: typer.Typer) -> None:
    app.command("report")(command)


def command(
    source: Annotated[Path, typer.Argument(help="A file of result lines, or the folder of a run.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write.")] = Path("report.html"),
) -> None:
    """Write the report: one HTML file with the quality-cost plots, the tables and the commands.

    Example: [bold]tokenmill report runs/demo -o report.html[/bold]
    """
    from tokenmill.bench.report import write_report

    console().print(f"wrote {write_report(source, output)}")
