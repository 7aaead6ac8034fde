"""``tokenmill run needle-threading``: how long a context your model or endpoint can really use."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from tokenmill.cli._output import Json, console, print_json, print_table, quiet_loading
from tokenmill.errors import LimitError, TokenmillError

if TYPE_CHECKING:
    from tokenmill.probe import Answer, Example, TokenProfile
    from tokenmill.probe._answers import Progress

_WHERE = "run needle-threading"
_DTYPES = ("float32", "bfloat16", "float16")
_UNITS = ("characters", "pairs", "tokens")


class FailedError(TokenmillError):
    """The run is over, and not one example was answered."""


def command(
    model: Annotated[str, typer.Option(help="An embedded model, a folder, or a transformers id.")] = "",
    endpoint: Annotated[str, typer.Option(help="An OpenAI-compatible API: http://127.0.0.1:8000/v1")] = "",
    served: Annotated[str, typer.Option(help="The model's name at the endpoint, if it has several.")] = "",
    mode: Annotated[str, typer.Option(help="What the endpoint is asked: chat or completion.")] = "chat",
    key_variable: Annotated[str, typer.Option(help="Environment variable with the API key.")] = "TOKENMILL_API_KEY",
    timeout: Annotated[float, typer.Option(help="Seconds for a response of the endpoint.")] = 300.0,
    retries: Annotated[int, typer.Option(help="Further tries after a fault of the endpoint.")] = 4,
    workers: Annotated[int, typer.Option(help="Requests at the same time.")] = 1,
    length_field: Annotated[str, typer.Option(help="max_tokens or max_completion_tokens.")] = "max_tokens",
    tasks: Annotated[
        str, typer.Option(help="single, multiple, conditional, threading, multi-threading, branched; with commas.")
    ] = "single,multiple,conditional,threading,multi-threading",
    contexts: Annotated[str, typer.Option(help="Lengths of the haystack, with commas.")] = "480,960",
    unit: Annotated[
        str, typer.Option(help="Of --contexts: characters, pairs, or tokens of the bare haystack.")
    ] = "characters",
    repeats: Annotated[int, typer.Option(help="Haystacks of each length.")] = 1,
    depths: Annotated[str, typer.Option(help="Of the single needle, in percent.")] = "0,50,100",
    needles: Annotated[str, typer.Option(help="How many keys are asked, or have the character.")] = "3",
    placements: Annotated[str, typer.Option(help="Of those: random, clustered.")] = "random",
    character: Annotated[str, typer.Option(help="Of conditional needles: * or &.")] = "*",
    lengths: Annotated[str, typer.Option(help="Steps of a thread.")] = "2,3",
    directions: Annotated[str, typer.Option(help="Of a thread: forward, backward, random.")] = "forward,backward",
    threads: Annotated[str, typer.Option(help="How many threads at once.")] = "2",
    branching: Annotated[str, typer.Option(help="Branches of each step of a branched thread.")] = "2",
    branches: Annotated[str, typer.Option(help="What is asked of it: final, all.")] = "final",
    fresh: Annotated[bool, typer.Option("--fresh", help="A haystack of its own for each question.")] = False,
    keys: Annotated[str, typer.Option(help="What keys and values are: uuid, as published, or name.")] = "uuid",
    seed: Annotated[int, typer.Option(help="Of the first haystack.")] = 0,
    data: Annotated[Path | None, typer.Option(help="Your own examples (JSON lines) in place of new ones.")] = None,
    examples: Annotated[Path | None, typer.Option(help="Write the examples there (JSON lines).")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the answers; what is there is not asked again.")] = Path(
        "runs/needle-threading"
    ),
    plots: Annotated[bool, typer.Option("--plots", help="Draw accuracy and contours into the folder (SVG).")] = False,
    tokenizers: Annotated[str, typer.Option(help="Tokenizers to compare on the haystack, with commas.")] = "",
    threshold: Annotated[float, typer.Option(help="Accuracy of the effective context.")] = 0.75,
    max_new_tokens: Annotated[int | None, typer.Option(help="Of an answer; by default what its values need.")] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts that the model gets at once.")] = 1,
    template: Annotated[str, typer.Option(help="The tokenizer's chat template: auto or none.")] = "auto",
    dtype: Annotated[str, typer.Option(help=f"Of the model: {', '.join(_DTYPES)}.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="Where the model goes.")] = "cpu",
    as_json: Json = False,
) -> None:
    """Ask a model or an endpoint for values and threads in haystacks, and say how long a context it can use.

    Answers are kept as they come, so an interrupted run goes on where it stopped.

    Example: [bold]tokenmill run needle-threading --model gemma-3-270m --tasks single --contexts 400,800[/bold]

    An endpoint: [bold]tokenmill run needle-threading --endpoint http://127.0.0.1:8000/v1 --contexts 8000,32000[/bold]

    Tokenizers alone: [bold]tokenmill run needle-threading --tokenizers gpt2,python-target[/bold]
    """
    from tokenmill.probe import NeedleThreading, from_jsonl, to_jsonl

    if model and endpoint:
        raise typer.BadParameter("give either --model or --endpoint")
    if not (model or endpoint or examples or tokenizers):
        raise typer.BadParameter("give --model or --endpoint, --examples to write the questions, or --tokenizers")
    for name, value, known in (("unit", unit, _UNITS), ("dtype", dtype, _DTYPES)):
        if value not in known:
            raise LimitError(_WHERE, name, value, f"one of {', '.join(known)}")
    if not 0 < threshold <= 1:
        raise LimitError(_WHERE, "threshold", threshold, "in (0, 1]")
    quiet_loading()
    asked: Any = None
    if endpoint:
        asked = _endpoint(endpoint, served, mode, key_variable, timeout, retries, workers, length_field)
    measures = _tokenizers(tokenizers)
    sizes = _numbers("contexts", contexts)
    suite: list[Example] = []
    if data is not None:
        suite = list(from_jsonl(data))
    elif model or endpoint or examples:
        grid: dict[str, Any] = {"tasks": _words(tasks), "repeats": repeats, "depths": _numbers("depths", depths)}
        grid |= {"num_needles": _numbers("needles", needles), "placements": _words(placements), "character": character}
        grid |= {"thread_lengths": _numbers("lengths", lengths), "directions": _words(directions), "seed": seed}
        grid |= {"num_threads": _numbers("threads", threads), "branching_factors": _numbers("branching", branching)}
        grid |= {"branches": _words(branches), "fresh": fresh, "keys": keys}
        NeedleThreading(**grid)  # a bad value is refused before a model is loaded
        sizes = _characters(sizes, unit, model, measures, keys)
        suite = list(NeedleThreading(contexts=sizes, **grid).suite())
    if examples is not None:
        to_jsonl(suite, examples)
    if model:
        asked = _local(model, dtype, device, template, batch_size)
    done = _Done(suite, _profiles(measures), threshold, out / "answers.jsonl" if asked is not None else None, examples)
    if asked is not None:
        done.ask(asked, max_new_tokens, quiet=as_json)
        if plots:
            done.draw(out)
    done.tell(as_json)


def _words(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in _words(text))
    except ValueError as error:
        raise LimitError(_WHERE, name, text, "whole numbers with commas") from error


def _endpoint(
    url: str, served: str, mode: str, key: str, timeout: float, retries: int, workers: int, length_field: str
) -> Any:
    from tokenmill.probe import Endpoint

    how: dict[str, Any] = {"mode": mode, "key_variable": key, "timeout": timeout, "retries": retries}
    how |= {"workers": workers, "length_field": length_field}
    if not served:
        names = Endpoint(url, **how).served()
        if len(names) != 1:
            known = ", ".join(names) or "(the endpoint lists none)"
            raise LimitError(_WHERE, "served", "", f"one of {known}", "Name it with --served.")
        served = names[0]
    return Endpoint(url, served, **how)


def _local(name: str, dtype: str, device: str, template: Any, batch_size: int) -> Any:
    from tokenmill import models
    from tokenmill.probe import Local

    loaded, tokenizer = models.load(name, dtype=dtype, device=device)
    return Local(loaded, tokenizer, batch_size, template, name=f"{name}, {dtype}, {template}")


def _tokenizers(text: str) -> dict[str, Any]:
    from tokenmill import models

    return {name: models.tokenizer(name, where=_WHERE) for name in _words(text)}


def _characters(sizes: tuple[int, ...], unit: str, model: str, measures: dict[str, Any], keys: Any) -> tuple[int, ...]:
    """Lengths in characters. Tokens are those of the model, or of the first of --tokenizers for an endpoint."""
    from tokenmill import models
    from tokenmill.probe._haystack import pair_chars
    from tokenmill.probe._lengths import pairs_of

    if unit == "characters":
        return sizes
    tokenizer = None
    if unit == "tokens":
        tokenizer = models.tokenizer(model, where=_WHERE) if model else next(iter(measures.values()), None)
    name = f"n_{unit}"
    found = (pair_chars(keys) * pairs_of(**{name: size}, tokenizer=tokenizer, keys=keys) for size in sizes)
    return tuple(dict.fromkeys(found))


def _profiles(measures: dict[str, Any]) -> list[TokenProfile]:
    from tokenmill.probe import token_profile

    return token_profile(measures) if measures else []


@contextmanager
def _progress(*, quiet: bool) -> Generator[Progress, None, None]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

    screen = Console(stderr=True)
    off = quiet or not screen.is_terminal
    with Progress(BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=screen, disable=off) as bar:
        line = bar.add_task("", total=None)
        yield lambda done, total: bar.update(line, completed=done, total=total)


@dataclass(slots=True)
class _Done:
    """What is told at the end."""

    suite: list[Example]
    profiles: list[TokenProfile]
    threshold: float
    file: Path | None
    examples: Path | None
    answers: list[Answer] | None = None
    drawn: tuple[Path, ...] = ()

    def ask(self, asked: Any, max_new_tokens: int | None, *, quiet: bool) -> None:
        from tokenmill.probe.needle_threading import run

        with _progress(quiet=quiet) as progress:
            self.answers = run(asked, None, self.suite, out=self.file, max_new_tokens=max_new_tokens, progress=progress)
        errors = [a.error for a in self.answers if a.error]
        if len(errors) == len(self.answers):
            raise FailedError(f"{_WHERE}: not one of {len(errors)} examples was answered: {errors[0]}")

    def draw(self, folder: Path) -> None:
        """Each plot under a temporary name first."""
        from tokenmill.probe import draw_plots

        for name, svg in draw_plots(self.answers or (), self.profiles, threshold=self.threshold).items():
            temporary = folder / f".{name}.svg.tmp"
            temporary.write_text(svg, encoding="utf-8")
            self.drawn += (temporary.replace(folder / f"{name}.svg"),)

    def reached(self) -> dict[str, float]:
        """Task -> effective context in characters."""
        from tokenmill.probe import effective_context

        given = self.answers or []
        return {
            task: effective_context([a for a in given if a.task == task], self.threshold)
            for task in dict.fromkeys(a.task for a in given)
        }

    def tell(self, as_json: bool) -> None:
        from tokenmill.probe.needle_threading import aggregate

        cells, reached = aggregate(self.answers or ()), self.reached()
        if as_json:
            told = {"cells": [asdict(c) for c in cells], "effective_context": reached, "threshold": self.threshold}
            told |= {"tokens": [asdict(p) for p in self.profiles], "plots": [str(p) for p in self.drawn]}
            told |= {"answers": str(self.file) if self.file else None}
            print_json(told | {"examples": str(self.examples) if self.examples else None})
            return
        if cells:
            heads = ("task", "characters", "prompt tokens", "n", "accuracy", "95 %", "no answer")
            rows = [
                (
                    c.task,
                    f"{c.context:,}",
                    "" if c.prompt_tokens is None else f"{c.prompt_tokens:,.0f}",
                    str(c.n),
                    "" if c.accuracy is None else f"{c.accuracy:.2f}",
                    "" if c.low is None else f"{c.low:.2f}-{c.high:.2f}",
                    str(c.failed or ""),
                )
                for c in cells
            ]
            print_table(heads, rows, right=heads[1:])
            console().print(f"\neffective context (characters up to which accuracy is {self.threshold:g} or more):")
            print_table(("task", "characters"), [(t, f"{n:,.0f}") for t, n in reached.items()], right=("characters",))
        if self.profiles:
            heads = ("tokenizer", "tokens a pair", "characters a token", f"characters in {self.profiles[0].n_tokens:,}")
            shown = [
                (p.tokenizer, f"{p.tokens_per_pair:.1f}", f"{p.chars_per_token:.2f}", f"{p.context_chars:,}")
                for p in self.profiles
            ]
            print_table(heads, shown, right=heads[1:])
        for place in (self.examples, self.file, *self.drawn):
            if place is not None:
                console().print(f"written to {escape(str(place))}")
