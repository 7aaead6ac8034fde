"""``tokenmill run learn-your-tokens``: your text as words and units, its score, and what a model writes behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from tokenmill.cli._output import Json, console, print_json, print_table, quiet_loading, read_text
from tokenmill.errors import LimitError

_WHERE = "run learn-your-tokens"
_SHOWN = 12


def command(
    file: Annotated[Path | None, typer.Argument(help="A text; - reads standard input.")] = None,
    model: Annotated[Path | None, typer.Option(help="A folder with a word-pooled model.")] = None,
    segment: Annotated[bool, typer.Option(help="Show the words and how many units each has; needs no model.")] = False,
    base: Annotated[str, typer.Option(help="Units without a model: byte or char.")] = "byte",
    prompt: Annotated[str | None, typer.Option(help="Go on behind this text instead of scoring a file.")] = None,
    words: Annotated[int, typer.Option(min=1, help="Words to write.")] = 24,
    temperature: Annotated[float, typer.Option(help="Draw with this temperature; 0 takes the likeliest.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    as_json: Json = False,
) -> None:
    """Score a text by the word, show its words, or write on behind a prompt.

    Example: [bold]tokenmill run learn-your-tokens notes.txt --model runs/word-pooled[/bold]

    A model is trained by [bold]python recipes/word_pooled.py --out runs/word-pooled[/bold].
    """
    if (file is None) == (prompt is None):
        raise typer.BadParameter("give a FILE or --prompt, one of the two")
    text = read_text(_WHERE, file) if file is not None else ""
    if segment and file is not None:
        told = _segmented(text, base, model)
        _tell(told, as_json, ["words", "rows", "units", "units a word", "long words"])
        return
    loaded = _load(model)
    if prompt is not None:
        _write(loaded, prompt, words, temperature, seed, as_json)
        return
    (scores,) = loaded.score([text])
    order = sorted(range(len(scores.words)), key=scores.log_probs.__getitem__)[:_SHOWN]
    told = {
        "bits_per_byte": scores.bits_per_byte,
        "bytes": scores.bytes,
        "words": len(scores.words),
        "surprising": [[scores.words[i], scores.log_probs[i]] for i in order],
    }
    _tell(told, as_json, ["bits_per_byte", "bytes", "words"])
    if not as_json:
        print_table(["word", "nats"], [[escape(repr(word)), f"{-cost:.1f}"] for word, cost in told["surprising"]])


def _load(folder: Path | None) -> Any:
    from tokenmill.text import WordPooledLM

    if folder is None or not (folder / "words.json").is_file():
        limit = "a folder with a word-pooled model and its words.json"
        raise LimitError(_WHERE, "model", str(folder), limit, "Train one: python recipes/word_pooled.py --out FOLDER.")
    quiet_loading()
    return WordPooledLM.from_pretrained(folder).eval()


def _segmented(text: str, base: str, model: Path | None) -> dict[str, Any]:
    from tokenmill.text import WordSegmenter

    if model is not None:
        one = WordSegmenter.load(model)
    else:
        one = WordSegmenter.of_characters([text]) if base == "char" else WordSegmenter(base)  # type: ignore[arg-type]
    words = one.words(text)
    _, lengths = one.encode(text)
    return {
        "words": len(words),
        "rows": len(lengths),
        "units": int(lengths.sum()),
        "units a word": float(lengths.sum() / len(words)),
        "long words": len(lengths) - len(words),
        "first": words[:40],
    }


def _write(model: Any, prompt: str, words: int, temperature: float, seed: int, as_json: bool) -> None:
    import torch

    how: dict[str, Any] = {"max_new_words": words}
    if temperature:
        generator = torch.Generator().manual_seed(seed)
        how |= {"do_sample": True, "temperature": temperature, "generator": generator}
    if as_json:
        print_json({"prompt": prompt, "text": model.generate([prompt], **how)[0]})
        return
    out = console()
    out.print(escape(prompt), end="", style="dim", soft_wrap=True)
    model.generate([prompt], on_word=lambda _, word: out.print(escape(word), end="", soft_wrap=True), **how)
    out.print()


def _tell(told: dict[str, Any], as_json: bool, shown: list[str]) -> None:
    if as_json:
        print_json(told)
        return
    cells = [f"{told[name]:.3f}" if isinstance(told[name], float) else f"{told[name]:,}" for name in shown]
    print_table([name.replace("_", " ") for name in shown], [cells])
    if "first" in told:
        console().print(escape("|".join(told["first"])))
