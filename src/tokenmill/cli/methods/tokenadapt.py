"""``tokenmill run tokenadapt``: a model of your own under a tokenizer of your own, as an ordinary folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from tokenmill import settings
from tokenmill.cli._output import Json, console, print_json, print_table, quiet_loading, write_folder
from tokenmill.cli.run import pairs
from tokenmill.errors import LimitError


def command(
    tokenizer: Annotated[Path, typer.Option(help="The new tokenizer: a folder, or a tokenizer.json.")],
    out: Annotated[Path | None, typer.Option(help="Where the model goes; without it nothing is written.")] = None,
    model: Annotated[str, typer.Option(help="An embedded model, a folder, or a transformers id.")] = "gemma-3-270m",
    embedder: Annotated[
        str, typer.Option(help="The space of texts: all-minilm-l6-v2, or hash, which needs no weights.")
    ] = "all-minilm-l6-v2",
    text: Annotated[Path | None, typer.Option(help="A file to measure on: bits a byte before and after.")] = None,
    chars: Annotated[int, typer.Option(min=1, help="Characters of that file at most.")] = 4000,
    dtype: Annotated[str, typer.Option(help="Dtype of the weights.")] = "bfloat16",
    force: Annotated[bool, typer.Option("--force", help="Replace the folder if it is there.")] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting; `tokenmill show` lists them.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Give a model another tokenizer; rows of new tokens are made from old ones.

    Example: [bold]tokenmill run tokenadapt --tokenizer my-tokenizer/ --out my-model/ --text sample.py[/bold]
    """
    from tokenmill.text import TokenAdapt

    how = TokenAdapt(**settings.from_text("tokenadapt", TokenAdapt, pairs(set_ or [])))
    _check_paths(tokenizer, out, text, force=force)
    from tokenmill import models
    from tokenmill.bench.tasks._transplanted import bits_per_byte

    quiet_loading()
    new = _load(tokenizer)
    before, old = models.load(model, dtype=dtype)
    made = how.transplant(before, old, new, embedder)
    data: dict[str, Any] = {"rows": made.report.counts, "vocabulary": [len(old), len(made.tokenizer)]}
    if text is not None:
        sample = text.read_text(encoding="utf-8")[:chars]
        sides = {"before": (before, old), "after": (made.model, made.tokenizer)}
        for name, (side, own) in sides.items():
            bits, tokens = bits_per_byte(side, own, sample)
            data[name] = {"bits_per_byte": bits, "tokens": tokens}
    data["examples"] = _examples(made, old)
    if out is not None:
        write_folder(out, lambda folder: _save(made, folder))
        data["out"] = str(out)
    if as_json:
        print_json(data)
    else:
        _show(data)


def _check_paths(tokenizer: Path, out: Path | None, text: Path | None, *, force: bool) -> None:
    if not tokenizer.exists():
        raise LimitError("run", "tokenizer", str(tokenizer), "a folder with a tokenizer, or a tokenizer.json")
    if text is not None and not text.is_file():
        raise LimitError("run", "text", str(text), "a file")
    if out is not None and out.exists() and not (force and (out / "config.json").is_file()):
        mend = "Use --force to replace a model's folder."
        raise LimitError("run", "out", str(out), "a folder that is not there yet", mend)


def _load(place: Path) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if place.is_file():
        return PreTrainedTokenizerFast(tokenizer_file=str(place))
    return AutoTokenizer.from_pretrained(place)


def _save(made: Any, folder: Path) -> None:
    made.model.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)


def _examples(made: Any, old: Any, count: int = 6) -> dict[str, dict[str, float]]:
    """Of a few new tokens, evenly through the vocabulary: what their rows are made of."""
    new_text = made.report.new_text
    found = {}
    for token in new_text[:: max(len(new_text) // count, 1)][:count].tolist():
        _, parts = made.report.of(token)
        found[made.tokenizer.decode([token])] = {old.decode([i]): round(w, 3) for i, w in parts.items()}
    return found


def _show(data: dict[str, Any]) -> None:
    print_table(("rows", "count"), [(k, f"{v:,}") for k, v in data["rows"].items()], right=("count",))
    if "before" in data:
        console().print()
        rows = [(k, f"{data[k]['bits_per_byte']:.3f}", f"{data[k]['tokens']:,}") for k in ("before", "after")]
        print_table(("", "bits a byte", "tokens"), rows, right=("bits a byte", "tokens"))
    console().print()
    for token, parts in data["examples"].items():
        made_of = " + ".join(f"{w:g} {piece!r}" for piece, w in parts.items())
        console().print(escape(f"{token!r} = {made_of or 'the mean row'}"))
    if "out" in data:
        console().print(f"\nwrote {escape(data['out'])}")
