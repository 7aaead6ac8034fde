"""``tokenmill run learn2pd``: an answer that fills in as far as a trained filter trusts it, pass by pass."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tokenmill.cli import _unmasked
from tokenmill.cli._output import Json

_WHERE = "run learn2pd"


def command(
    prompt: Annotated[str | None, typer.Argument(help="What to answer; nothing takes a held-out exercise.")] = None,
    model: Annotated[str, typer.Option(help="An embedded diffusion model or a folder.")] = _unmasked.MODEL,
    filter_: Annotated[Path | None, typer.Option("--filter", help="A trained filter; else the model's asset.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Acceptance; nothing takes the filter's own.")] = None,
    predict_eot: Annotated[bool, typer.Option("--predict-eot", help="Cut the answer where its text ends.")] = False,
    eot_min_confidence: Annotated[float, typer.Option(help="Least confidence of such a cut.")] = 0.9,
    cache: Annotated[str, typer.Option(help="none, prefix, dual, delayed, free or window.")] = "none",
    new_tokens: Annotated[int | None, typer.Option(min=1, help="Length of the answer.")] = None,
    seed: Annotated[int, typer.Option(help="Of the exercise.")] = 0,
    delay: Annotated[float, typer.Option(help="Seconds between two pictures on a terminal.")] = 0.15,
    as_json: Json = False,
) -> None:
    """Fill in an answer by Learn2PD, then one token a pass, and show what that saves.

    Example: [bold]tokenmill run learn2pd --model diffusion-long --predict-eot "107:121="[/bold]
    """
    folder = _unmasked.trained(_WHERE, model, "filter", filter_)
    from tokenmill.diffuse.learn2pd import BlockFilter, Learn2PD

    made = BlockFilter.load(folder)
    rule = Learn2PD(made, threshold=threshold, predict_eot=predict_eot, eot_min_confidence=eot_min_confidence)
    block = made.config.block_length
    _unmasked.run(_unmasked.Asked(_WHERE, model, prompt, new_tokens, block, cache, seed, delay, as_json), rule)
