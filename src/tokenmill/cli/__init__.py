"""The command ``tokenmill``. Each file of this folder is a subcommand of that name, and only this folder prints."""

from __future__ import annotations

import difflib
import importlib
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from tokenmill.errors import LimitError, TokenmillError

app = typer.Typer(
    name="tokenmill",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_USAGE: type[Exception] = typer.BadParameter.__mro__[1]  # UsageError, wherever this version of typer keeps it


@app.callback()
def _tokenmill(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of a failure.")] = False,  # noqa: ARG001
    version: Annotated[bool, typer.Option("--version", help="Show the version and stop.")] = False,
) -> None:
    """Published methods about tokens that work for real, and one bench for all of them.

    Example: [bold]tokenmill run token-recycling --prompt "def quicksort(values):"[/bold]
    """
    if version:
        from tokenmill import __version__

        typer.echo(__version__)
        raise typer.Exit


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit code is 2 for bad usage, 1 for a failure and 130 for an interruption.

    A failure is one line; with ``--debug``, anywhere on the line, its traceback as well.
    """
    given = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in given
    try:
        code = app([a for a in given if a != "--debug"], prog_name="tokenmill", standalone_mode=False)
    except KeyboardInterrupt:
        return _failed("interrupted", 130)
    except Exception as error:  # noqa: BLE001 - the edge of the program: one line, not a traceback
        if debug:
            traceback.print_exc()
        if isinstance(error, _USAGE):
            return _failed(_usage(error), 2)
        if isinstance(error, LimitError):
            return _failed(str(error), 2)
        text = str(error) if isinstance(error, TokenmillError) else f"{type(error).__name__}: {error}"
        return _failed(text or type(error).__name__, 1)
    return code if isinstance(code, int) else 0


def _failed(text: str, code: int) -> int:
    typer.echo(f"tokenmill: {' '.join(text.split())}", err=True)
    return code


def _usage(error: Exception) -> str:
    """The message of a usage error, with the nearest commands when a command is not known."""
    text = error.format_message() if hasattr(error, "format_message") else str(error)  # pyright: ignore[reportAttributeAccessIssue]
    context = getattr(error, "ctx", None)
    known = getattr(getattr(context, "command", None), "commands", None) or {}
    if text.startswith("No such command") and known:
        wrong = text.split("'")[1] if "'" in text else ""
        near = difflib.get_close_matches(wrong, known, n=3, cutoff=0.4) or sorted(known)
        return f"No such command {wrong!r}. Did you mean {', '.join(near)}?"
    return text or "nothing to do; see --help"


for _file in sorted(Path(__file__).parent.glob("[a-z]*.py")):
    importlib.import_module(f"{__name__}.{_file.stem}").register(app)
