"""What the subcommands share when they read a text, print, or write a folder."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tokenmill.catalog import Card
from tokenmill.errors import LimitError

Json = Annotated[bool, typer.Option("--json", help="Print data instead of a table.")]
Slug = Annotated[str, typer.Argument(metavar="SLUG", help="The method, as `tokenmill list` names it.")]


def console() -> Console:
    """Where tables go; made anew so that it writes to the present standard output."""
    return Console(highlight=False, soft_wrap=True)


def print_json(data: Any) -> None:
    """Plain data as JSON; sets become sorted lists."""
    typer.echo(json.dumps(data, indent=2, default=_plain, ensure_ascii=False))


def print_table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> None:
    """A table without lines, the heads named in `right` aligned to the right."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in heads:
        table.add_column(head, justify="right" if head in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console().print(table)


def quiet_loading() -> None:
    """Keep transformers' own progress bars out of what a command prints."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def read_text(where: str, file: Path) -> str:
    """A user's text from a file, or from standard input for "-".

    Raises:
        LimitError: no such file, one that is not UTF-8, or nothing but blanks in it.
    """
    if str(file) == "-":
        text = sys.stdin.read()
    elif file.is_file():
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise LimitError(where, "file", str(file), "a text in UTF-8") from error
    else:
        raise LimitError(where, "file", str(file), "a file, or - for standard input")
    if not text.strip():
        raise LimitError(where, "file", str(file), "a text that is not empty")
    return text


def write_folder(out: Path, fill: Callable[[Path], None]) -> None:
    """All of a folder or nothing: `fill` writes into one beside it, which is renamed and replaces what was there."""
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        fresh.chmod(0o755)
        fill(fresh)
        if out.exists():
            shutil.rmtree(out)
        fresh.rename(out)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def card_data(card: Card) -> dict[str, Any]:
    """A card as plain data."""
    return asdict(card)


def _plain(value: Any) -> Any:
    if isinstance(value, frozenset | set):
        return sorted(value)
    if isinstance(value, tuple):
        return list(value)
    return str(value)
