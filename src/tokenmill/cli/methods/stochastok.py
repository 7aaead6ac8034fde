"""``tokenmill run stochastok``: expand a text or a tokenised data set."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.markup import escape

from tokenmill import models
from tokenmill.cli._output import Json, console, print_json, print_table, quiet_loading
from tokenmill.errors import LimitError, MissingExtraError
from tokenmill.text import ExpansionTable, StochasTok, TokenBytes

_WHERE = "run stochastok"
_CHUNK = 4000  # examples that are expanded at once
_SHOWN = 24  # tokens of the sample


def command(
    file: Annotated[Path, typer.Argument(help="A text, or JSON lines with text or input_ids.")],
    tokenizer: Annotated[
        str, typer.Option(help="An embedded model, a folder, a tokenizer.json, or a transformers id.")
    ] = "gemma-3-270m",
    p: Annotated[float, typer.Option(help="Attempts for each token.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Of all draws.")] = 0,
    epoch: Annotated[int, typer.Option(help="Another epoch, another segmentation.")] = 0,
    max_length: Annotated[int | None, typer.Option(help="Tokens of an example at most.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the examples go: a .jsonl or .arrow file.")] = None,
    table: Annotated[Path | None, typer.Option(help="The table of pairs: read if it is there, else written.")] = None,
    as_json: Json = False,
) -> None:
    """Write random tokens of your training text as pairs of tokens, and show how it grows.

    An example is a line of a text (with its line end), or of JSON lines an object with "text" or with "input_ids"; its
    other fields are kept, and labels, word_ids and attention_mask follow their tokens.

    Example: [bold]tokenmill run stochastok notes.txt --tokenizer python-target --p 0.1 --out expanded.jsonl[/bold]
    """
    if not file.is_file():
        raise LimitError(_WHERE, "file", str(file), "a file with text or JSON lines")
    if out is not None and out.suffix not in (".jsonl", ".arrow"):
        raise LimitError(_WHERE, "out", str(out), "a .jsonl or .arrow file")
    quiet_loading()
    view = TokenBytes.of(models.tokenizer(tokenizer, where=_WHERE))
    how = StochasTok(_table(view, table), p=p, seed=seed)
    found = _Counts()
    examples = _expanded(how, view, file, epoch, max_length, found)
    if out is None:
        for _ in examples:
            pass
    else:
        _write(examples, out)
    _report(view, how, found, out, as_json)


class _Counts:
    """What is told at the end."""

    def __init__(self) -> None:
        self.examples = self.before = self.after = self.able = 0
        self.sample: tuple[list[int], list[int]] | None = None


def _table(view: TokenBytes, path: Path | None) -> ExpansionTable:
    if path is not None and path.exists():
        return ExpansionTable.load(path, view)
    made = ExpansionTable.from_tokenizer(view)
    if path is not None:
        made.save(path)
    return made


def _examples(file: Path, view: TokenBytes) -> Iterator[dict[str, Any]]:
    """Examples with input_ids."""
    as_lines = file.suffix in (".jsonl", ".json", ".ndjson")
    with file.open(encoding="utf-8", newline="") as source:
        for number, line in enumerate(source, start=1):
            if not as_lines:
                yield {"text": line, "input_ids": view.encode(line)}
                continue
            if not line.strip():
                continue
            try:
                example = json.loads(line)
                if "input_ids" not in example:
                    example["input_ids"] = view.encode(example["text"])
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                limit = 'a JSON object with "text" or "input_ids"'
                raise LimitError(f"{file}:{number}", "line", line[:60].strip(), limit) from error
            yield example


def _expanded(
    how: StochasTok, view: TokenBytes, file: Path, epoch: int, max_length: int | None, found: _Counts
) -> Iterator[dict[str, Any]]:
    examples = _examples(file, view)
    while chunk := list(islice(examples, _CHUNK)):
        names = list(chunk[0])
        for number, example in enumerate(chunk, start=found.examples + 1):
            if list(example) != names:
                raise LimitError(_WHERE, f"fields of example {number}", ", ".join(example), ", ".join(names))
        batch = {name: [example[name] for example in chunk] for name in names}
        numbers = list(range(found.examples, found.examples + len(chunk)))
        made = how.columns(batch, numbers, epoch=epoch, max_length=max_length)
        for row in range(len(chunk)):
            before, after = batch["input_ids"][row], made["input_ids"][row]
            found.before += len(before)
            found.after += len(after)
            found.able += int(how.table.splittable[np.asarray(before, dtype=np.int64)].sum())
            if found.sample is None and before[:_SHOWN] != after[:_SHOWN]:
                found.sample = before[:_SHOWN], after[:_SHOWN]
            yield {name: values[row] for name, values in made.items()}
        found.examples += len(chunk)


def _write(examples: Iterator[dict[str, Any]], out: Path) -> None:
    """Under a temporary name, then moved into its place."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        if out.suffix == ".arrow":
            _write_arrow(examples, temporary)
        else:
            with temporary.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(example, ensure_ascii=False) + "\n" for example in examples)
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)


def _write_arrow(examples: Iterator[dict[str, Any]], path: Path) -> None:
    """An Arrow stream, as `datasets.Dataset.from_file` reads it."""
    try:
        import pyarrow as pa  # type: ignore[import-not-found]
    except ImportError as error:
        raise MissingExtraError(f"{_WHERE} with an .arrow file", "pyarrow", "text") from error
    with pa.OSFile(str(path), "wb") as sink:
        first = pa.Table.from_pylist(list(islice(examples, _CHUNK)))
        with pa.ipc.new_stream(sink, first.schema) as writer:
            writer.write_table(first)
            while chunk := list(islice(examples, _CHUNK)):
                writer.write_table(pa.Table.from_pylist(chunk, schema=first.schema))


def _report(view: TokenBytes, how: StochasTok, found: _Counts, out: Path | None, as_json: bool) -> None:
    growth = found.after / max(found.before, 1) - 1
    able = found.able / max(found.before, 1)
    before, after = found.sample or ([], [])
    if as_json:
        facts = {"examples": found.examples, "tokens_before": found.before, "tokens_after": found.after}
        facts |= {"growth": growth, "splittable": able, "pairs": len(how.table.left), "p": how.p, "seed": how.seed}
        pieces = {"before": _pieces(view, before), "after": _pieces(view, after)}
        print_json({**facts, "sample": pieces, "out": None if out is None else str(out)})
        return
    heads = ("examples", "tokens before", "after", "growth", "splittable tokens", "pairs in the table")
    counts = (f"{found.examples:,}", f"{found.before:,}", f"{found.after:,}")
    print_table(heads, [(*counts, f"{growth:+.1%}", f"{able:.1%}", f"{len(how.table.left):,}")], right=heads)
    for name, ids in (("before", before), ("after", after)):
        if ids:
            console().print(f"{name:>6}: {escape('|'.join(_pieces(view, ids)))}")
    if out is not None:
        console().print(f"written to {escape(str(out))}")


def _pieces(view: TokenBytes, ids: list[int]) -> list[str]:
    """Tokens to read: a piece of a character as its bytes, a special token by its name."""
    names = {i: name for name, i in view.specials.items()}
    found = []
    for i in ids:
        data = view[i]
        text = names.get(i, f"<{i}>") if data is None else data.decode("utf-8", errors="backslashreplace")
        found.append(text.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t"))
    return found
