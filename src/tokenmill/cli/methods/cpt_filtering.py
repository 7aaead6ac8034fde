"""``tokenmill run cpt-filtering``: split a file of texts into what is kept and what looks encoded, or look at one."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, Literal, cast, get_args

import typer
from rich.markup import escape
from rich.progress import Progress

from tokenmill import models
from tokenmill.cli._output import Json, console, print_json, print_table, quiet_loading
from tokenmill.errors import LimitError, unknown_name

if TYPE_CHECKING:
    from tokenmill.text import CPTFilter

_WHERE = "run cpt-filtering"
_Structured = Literal["allow", "flag", "threshold"]


def command(
    file: Annotated[Path | None, typer.Argument(metavar="FILE.jsonl", help="JSON lines, one text each.")] = None,
    tokenizer: Annotated[str, typer.Option(help="A tokenizer.json, an embedded model, a folder or a model id.")] = "",
    text: Annotated[str | None, typer.Option(help="Look at this one text instead of a file.")] = None,
    calibrate: Annotated[Path | None, typer.Option(help="JSON lines of clean texts to fit thresholds on.")] = None,
    calibration: Annotated[Path | None, typer.Option(help="A file with thresholds.")] = None,
    save_calibration: Annotated[Path | None, typer.Option(help="Where to keep the fitted thresholds.")] = None,
    threshold: Annotated[float | None, typer.Option(help="One threshold for whole texts of every script.")] = None,
    fpr: Annotated[float, typer.Option(help="Share of clean texts that may be flagged, for --calibrate.")] = 0.01,
    windows: Annotated[
        str, typer.Option(help="Tokens of the windows, with commas; '' looks at no parts.")
    ] = "10,20,40",
    structured: Annotated[str, typer.Option(help="Texts of digits and signs: allow, flag or threshold.")] = "allow",
    out: Annotated[Path | None, typer.Option(help="Where the lines that are kept go, unchanged.")] = None,
    rejected: Annotated[Path | None, typer.Option(help="Where flagged lines go, with the verdict.")] = None,
    text_field: Annotated[str, typer.Option(help="Name of the field with the text.")] = "text",
    batch_size: Annotated[int, typer.Option(min=1, help="Texts that are tokenized together.")] = 1024,
    as_json: Json = False,
) -> None:
    """Flag texts that are hidden in ciphers or encodings, by their characters per token.

    Example: [bold]tokenmill run cpt-filtering prompts.jsonl --tokenizer tokenizer.json --calibrate clean.jsonl
    --out kept.jsonl --rejected rejected.jsonl[/bold]

    An interrupted run goes on where it stopped when the same command is given again.
    """
    if (file is None) == (text is None):
        raise typer.BadParameter("give a FILE.jsonl or --text, one of the two")
    if not tokenizer:
        raise typer.BadParameter("give the tokenizer of your model with --tokenizer")
    if sum(given is not None for given in (calibrate, calibration, threshold)) != 1:
        raise typer.BadParameter("give thresholds in one way: --calibrate, --calibration or --threshold")
    if structured not in get_args(_Structured):
        raise unknown_name(_WHERE, "structured", structured, get_args(_Structured))
    for path in (file, calibrate):
        if path is not None and not path.is_file():
            raise LimitError(_WHERE, "file", str(path), "a file of JSON lines")
    from tokenmill.text import Calibration, CPTFilter

    quiet_loading()
    made = CPTFilter(
        models.tokenizer(tokenizer, where=_WHERE),
        windows=_windows(windows),
        structured=cast(_Structured, structured),
        threshold=threshold,
        calibration=Calibration.load(calibration) if calibration is not None else None,
    )
    if calibrate is not None:
        made = _fitted(made, calibrate, text_field, fpr, quiet=as_json)
        if save_calibration is not None and made.calibration is not None:
            made.calibration.save(save_calibration)
    if text is not None:
        _one(made, text, as_json)
    elif file is not None:
        _Bulk(made, file, text_field, batch_size, out, rejected).run(as_json)


def _windows(written: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in written.split(",") if part.strip())
    except ValueError:
        raise LimitError(_WHERE, "windows", written, "numbers with commas, such as 10,20,40") from None


def _fitted(made: CPTFilter, file: Path, text_field: str, fpr: float, *, quiet: bool) -> CPTFilter:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with file.open("rb") as source:
            found = made.calibrate((one.text for one in _lines(source, file, text_field)), fpr=fpr)
    if not quiet:
        for warning in said:
            console().print(f"[yellow]{escape(str(warning.message))}[/]")
    return found


@dataclass(slots=True)
class _Line:
    raw: bytes
    record: dict[str, Any]
    text: str
    number: int
    stop: int  # byte of the file behind this line


def _lines(source: IO[bytes], file: Path, text_field: str, number: int = 0, at: int = 0) -> Iterator[_Line]:
    """The records of a file from where it stands, behind `number` lines and `at` bytes; blank lines are left out."""
    for raw in source:
        number, at = number + 1, at + len(raw)
        if not raw.strip():
            continue
        try:
            record = json.loads(raw)
            text = record[text_field]
        except (ValueError, KeyError, TypeError) as error:
            limit = f"a JSON object with a text in {text_field!r}"
            raise LimitError(f"{file}:{number}", "line", raw[:60].decode(errors="replace"), limit) from error
        if not isinstance(text, str):
            raise LimitError(f"{file}:{number}", text_field, type(text).__name__, "a text")
        if not text.isascii():  # JSON may hold halves of surrogate pairs; they are measured as U+FFFD
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        yield _Line(raw, record, text, number, at)


def _one(made: CPTFilter, text: str, as_json: bool) -> None:
    """One text: its verdict, with the worst part marked."""
    verdict = made.flag(text)
    span = verdict.worst_span
    if as_json:
        worst = None
        if span is not None:
            worst = {"start": span.start, "end": span.stop, "cpt": span.cpt, "text": text[span.start : span.stop]}
        print_json(
            {
                "flagged": verdict.flagged,
                "reason": verdict.reason,
                "cpt": verdict.cpt,
                "threshold": verdict.threshold,
                "script": verdict.script,
                "worst_span": worst,
                "spans": [list(pair) for pair in verdict.spans],
            }
        )
        return
    numbers = [("characters per token", verdict.cpt), ("threshold", verdict.threshold)]
    rows = [["flagged", "yes" if verdict.flagged else "no"], ["reason", verdict.reason], ["script", verdict.script]]
    rows += [[name, "-" if value is None else f"{value:.2f}"] for name, value in numbers]
    print_table(["", ""], rows)
    if span is not None:
        before, part, after = text[: span.start], text[span.start : span.stop], text[span.stop :]
        style = "bold red" if verdict.flagged else "bold"
        console().print(f"{escape(before)}[{style}]{escape(part)}[/]{escape(after)}")
        console().print(f"worst: characters {span.start} to {span.stop}, {span.cpt:.2f} per token")


@dataclass(slots=True)
class _Bulk:
    """A file in batches. What is done is noted after every batch, so that nothing is done twice."""

    filter: CPTFilter
    file: Path
    text_field: str
    batch_size: int
    out: Path | None
    rejected: Path | None
    done: dict[str, Any] = field(default_factory=dict)

    def run(self, as_json: bool) -> None:
        targets = {name: path for name, path in (("kept", self.out), ("rejected", self.rejected)) if path is not None}
        if len({path.resolve() for path in (self.file, *targets.values())}) < 1 + len(targets):
            raise LimitError(_WHERE, "out", str(self.out), "another file than FILE and --rejected")
        state = next((path.with_name(path.name + ".progress") for path in targets.values()), None)
        parts = {name: path.with_name(path.name + ".part") for name, path in targets.items()}
        self.done = self._state(state, parts)
        resumed, begun = self.done["texts"], time.perf_counter()
        size_before = self.done["bytes"]
        files: dict[str, IO[bytes]] = {}
        try:
            for name, part in parts.items():
                files[name] = part.open("r+b" if self.done["sizes"].get(name) else "wb")
                files[name].truncate(self.done["sizes"].get(name, 0))
                files[name].seek(0, 2)
            self._all(files, state, as_json)
        finally:
            for one in files.values():
                one.close()
        for name, part in parts.items():
            part.replace(targets[name])
        if state is not None:
            state.unlink(missing_ok=True)
        seconds = time.perf_counter() - begun
        self._report((self.done["bytes"] - size_before) / 1e6 / max(seconds, 1e-9), resumed, as_json)

    def _all(self, files: dict[str, IO[bytes]], state: Path | None, quiet: bool) -> None:
        total = self.file.stat().st_size
        with self.file.open("rb") as source, Progress(console=console(), transient=True, disable=quiet) as bar:
            source.seek(self.done["bytes"])
            shown = bar.add_task("filtering", total=total, completed=self.done["bytes"])
            batch: list[_Line] = []
            for line in _lines(source, self.file, self.text_field, self.done["lines"], self.done["bytes"]):
                batch.append(line)
                if len(batch) == self.batch_size:
                    self._batch(batch, files, state)
                    bar.update(shown, completed=self.done["bytes"])
                    batch = []
            self._batch(batch, files, state)

    def _batch(self, batch: list[_Line], files: dict[str, IO[bytes]], state: Path | None) -> None:
        from tokenmill.text._scripts import SCRIPTS

        if not batch:
            return
        found = self.filter.decide([line.text for line in batch])
        flagged = found.flagged.tolist()
        for i, line in enumerate(batch):
            if not flagged[i] and "kept" in files:
                files["kept"].write(line.raw if line.raw.endswith(b"\n") else line.raw + b"\n")
            elif flagged[i] and "rejected" in files:
                files["rejected"].write(_rejection(line.record, found.verdict(i)))
        done = self.done
        scripts = Counter(SCRIPTS[code] for code in found.script.tolist())
        hits = Counter(SCRIPTS[code] for code, hit in zip(found.script.tolist(), flagged, strict=True) if hit)
        for name, count in scripts.items():
            texts, before = done["scripts"].get(name, (0, 0))
            done["scripts"][name] = (texts + count, before + hits[name])
        done["texts"] += len(batch)
        done["flagged"] += sum(flagged)
        done["bytes"], done["lines"] = batch[-1].stop, batch[-1].number
        for one in files.values():
            one.flush()
        done["sizes"] = {name: one.tell() for name, one in files.items()}
        if state is not None:
            fresh = state.with_name(state.name + ".new")
            fresh.write_text(json.dumps(done))
            fresh.replace(state)

    def _state(self, state: Path | None, parts: dict[str, Path]) -> dict[str, Any]:
        """What an interrupted run with these settings on this file has done, or nothing."""
        stat, own = self.file.stat(), self.filter
        about = [str(self.file.resolve()), stat.st_size, stat.st_mtime_ns, self.text_field, own.fingerprint]
        about += [own.windows, own.structured, own.threshold, repr(own.calibration)]
        about += [str(self.out), str(self.rejected)]
        key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
        fresh = {"key": key, "texts": 0, "flagged": 0, "bytes": 0, "lines": 0, "scripts": {}, "sizes": {}}
        if state is None or not state.is_file():
            return fresh
        try:
            found = json.loads(state.read_text())
        except ValueError:
            return fresh
        if not isinstance(found, dict) or found.get("key") != key:
            return fresh
        there = all(part.is_file() and part.stat().st_size >= found["sizes"][name] for name, part in parts.items())
        return found if there else fresh

    def _report(self, speed: float, resumed: int, as_json: bool) -> None:
        done = self.done
        scripts = {name: {"texts": n, "flagged": hits} for name, (n, hits) in sorted(done["scripts"].items())}
        if as_json:
            summary = {"texts": done["texts"], "kept": done["texts"] - done["flagged"], "rejected": done["flagged"]}
            print_json(summary | {"resumed": resumed, "mb_per_s": speed, "scripts": scripts})
            return
        rows = [[name, str(one["texts"]), str(one["flagged"])] for name, one in scripts.items()]
        print_table(["script", "texts", "flagged"], rows, right=("texts", "flagged"))
        went_on = f" ({resumed} of them in an earlier run)" if resumed else ""
        console().print(f"{done['texts']} texts{went_on}, {done['flagged']} flagged, {speed:.1f} MB/s")


def _rejection(record: dict[str, Any], verdict: Any) -> bytes:
    span = verdict.worst_span
    about = {
        "reason": verdict.reason,
        "cpt": verdict.cpt,
        "threshold": verdict.threshold,
        "script": verdict.script,
        "worst_span": None if span is None else [span.start, span.stop],
        "spans": [list(pair) for pair in verdict.spans],
    }
    return json.dumps(record | {"cpt_filter": about}, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
