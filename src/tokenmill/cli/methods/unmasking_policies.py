"""``tokenmill run unmasking-policies``: an answer that fills in as a trained policy decides, pass by pass."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tokenmill.cli import _unmasked
from tokenmill.cli._output import Json

_WHERE = "run unmasking-policies"


def command(
    prompt: Annotated[str | None, typer.Argument(help="What to answer; nothing takes a held-out exercise.")] = None,
    model: Annotated[str, typer.Option(help="An embedded diffusion model or a folder.")] = _unmasked.MODEL,
    policy: Annotated[Path | None, typer.Option(help="A trained policy; else the model's asset.")] = None,
    temperature: Annotated[float, typer.Option(help="Of the draws; 0 draws nothing.")] = 0.0,
    cache: Annotated[str, typer.Option(help="none, prefix, dual, delayed, free or window.")] = "none",
    new_tokens: Annotated[int | None, typer.Option(min=1, help="Length of the answer.")] = None,
    block: Annotated[int, typer.Option(min=0, help="Length of a block; 0 for the whole answer.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the exercise and the draws.")] = 0,
    delay: Annotated[float, typer.Option(help="Seconds between two pictures on a terminal.")] = 0.15,
    as_json: Json = False,
) -> None:
    """Fill in an answer by a learned policy, then one token a pass, and show what that saves.

    Example: [bold]tokenmill run unmasking-policies Pbdfhk[/bold]
    """
    folder = _unmasked.trained(_WHERE, model, "policy", policy)
    from tokenmill.diffuse.unmasking_policies import UnmaskingPolicy

    rule = UnmaskingPolicy(folder, temperature=temperature)
    _unmasked.run(_unmasked.Asked(_WHERE, model, prompt, new_tokens, block, cache, seed, delay, as_json), rule)
