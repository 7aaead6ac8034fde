"""How ``tokenmill run SLUG`` finds the command of a method: a file in ``cli/methods``, or the one for decoders."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand

METHODS = Path(__file__).parent / "methods"


def own_commands() -> list[str]:
    """Slugs of the methods with a command of their own. Reads file names, imports nothing."""
    return sorted(file.stem.replace("_", "-") for file in METHODS.glob("[a-z]*.py"))


def command_of(slug: str) -> Any:
    """The click command made from the function `command` of a method's file."""
    module = importlib.import_module(f"{__package__}.methods.{slug.replace('-', '_')}")
    app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
    app.command(context_settings={"help_option_names": ["-h", "--help"]})(module.command)
    return typer.main.get_command(app)


class RunCommand(TyperCommand):
    """The command for decoders, which hands over to a method's own command when the first argument names one."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """The context of whichever command runs; click invokes the command that the context belongs to."""
        slug = args[0].replace("_", "-") if args else ""
        if slug in own_commands():
            return command_of(slug).make_context(f"{info_name} {slug}", args[1:], parent=parent, **extra)
        return super().make_context(info_name, args, parent=parent, **extra)
