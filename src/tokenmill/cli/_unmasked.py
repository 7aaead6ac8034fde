"""``tokenmill run`` for rules of unmasking: the answer fills in, pass by pass, and then the counts."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.live import Live
from rich.text import Text

from tokenmill import corpora, models
from tokenmill.errors import LimitError

from ._output import console, print_json, print_table, quiet_loading

if TYPE_CHECKING:
    from tokenmill.diffuse import RevealRule
    from tokenmill.diffuse._trace import Snapshot

MODEL = "diffusion-mixed"
_MASK = "·"


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command line asked for."""

    where: str
    model: str
    prompt: str | None
    new_tokens: int | None
    block: int | None
    cache: str
    seed: int
    delay: float
    as_json: bool

    @property
    def task(self) -> Any:
        """The exercises that the model was trained for, or None."""
        return corpora.EXERCISE_TASKS.get(Path(self.model).name.removeprefix("diffusion-"))

    @property
    def text(self) -> str:
        """The prompt, or a held-out exercise."""
        if self.prompt is not None:
            return self.prompt
        if self.task is None:
            raise LimitError(self.where, "prompt", None, f"given, since {self.model} comes with no exercises")
        name = Path(self.model).name.removeprefix("diffusion-")
        return corpora.exercises(name, "test", 1, seed=self.seed)[0].prompt

    @property
    def room(self) -> int:
        """Length of the answer."""
        if self.new_tokens is not None:
            return self.new_tokens
        return self.task.answer if self.task is not None else 64

    @property
    def places(self) -> int | None:
        """Length of a block."""
        if self.block is not None:
            return self.block or None
        return self.task.block if self.task is not None else None


def trained(where: str, model: str, what: str, given: Path | None) -> Path:
    """The folder of a filter or policy: the given one, or the asset of the model.

    Raises:
        LimitError: there is none.
    """
    from tokenmill.models._catalog import ASSETS

    folder = given if given is not None else ASSETS / f"{Path(model).name}-{what}"
    if not folder.is_dir():
        mend = f"recipes/diffusion_{what}.py trains one."
        raise LimitError(where, what, str(given), f"the folder of a {what}; none of {model} ships", mend)
    return folder


def run(asked: Asked, rule: RevealRule) -> None:
    """Decode with the rule, shown as it goes, then one token a pass, and compare."""
    from tokenmill import diffuse
    from tokenmill.bench.tasks._unmasking import cache_of
    from tokenmill.bench.tasks.diffuse import CACHES
    from tokenmill.errors import unknown_name

    if asked.cache not in CACHES:
        raise unknown_name(asked.where, "cache", asked.cache, CACHES)
    text = asked.text
    quiet_loading()
    model, tokenizer = models.load(asked.model)
    inputs = tokenizer([text], return_tensors="pt")
    show = None if asked.as_json else _Display(tokenizer, asked)
    told: dict[str, dict[str, Any]] = {}
    sides = {"method": (rule, cache_of(asked.cache), show), "plain": (diffuse.Quota(1), None, None)}
    for who, (how, cache, watch) in sides.items():
        decoder = diffuse.Diffusion(how, cache, block_length=asked.places, seed=asked.seed, watch=watch)
        if watch is not None:
            watch.start(text)
        try:
            out = decoder.generate(
                model, inputs["input_ids"], max_new_tokens=asked.room, attention_mask=inputs["attention_mask"]
            )
        finally:
            if watch is not None:
                watch.stop()
        answer = corpora.answer_text(tokenizer, out[0, inputs["input_ids"].shape[1] :].tolist())
        trace = decoder.trace
        counts = {"passes": trace.model_calls, "positions": trace.positions, "flops": trace.flops}
        told[who] = {"text": answer, **counts, "revealed": trace.revealed}
    if asked.as_json:
        print_json({"prompt": text, **told})
        return
    _compare(told)


def _compare(told: dict[str, dict[str, Any]]) -> None:
    ours, plain = told["method"], told["plain"]
    rows = [
        (who, str(one["passes"]), f"{one['positions']:,}", f"{one['flops'] / 1e6:,.0f}")
        for who, one in (("method", ours), ("one token a pass", plain))
    ]
    console().print()
    print_table(("", "passes", "places fed", "million operations"), rows, right=("passes", "places fed"))
    same = "the same text" if ours["text"] == plain["text"] else f"one token a pass: {plain['text']}"
    console().print(f"\n{same}; {plain['passes'] / max(ours['passes'], 1):.1f}x fewer passes", markup=False)


class _Display:
    """The answer after each pass: on a terminal in place, otherwise one line a pass. What is new stands out."""

    def __init__(self, tokenizer: Any, asked: Asked) -> None:
        self.tokenizer, self.delay = tokenizer, asked.delay
        self.live: Live | None = None

    def start(self, prompt: str) -> None:
        """Show the prompt, and begin to draw."""
        console().print(Text(prompt, style="bold"))
        if console().is_terminal:
            self.live = Live(Text(""), console=console(), auto_refresh=False)
            self.live.start()

    def stop(self) -> None:
        """Leave the last picture."""
        if self.live is not None:
            self.live.stop()

    def __call__(self, seen: Snapshot) -> None:
        """Draw one pass."""
        line = Text().append(f"pass {seen.call:3d}  ", style="dim")
        fresh = seen.revealed[0, seen.prompt :].tolist()
        special = set(self.tokenizer.all_special_ids)
        for token, new in zip(seen.answer[0].tolist(), fresh, strict=True):
            if token == seen.mask_id:
                line.append(_MASK, style="dim")
            elif token in special:
                line.append("_" if new else " ", style="green" if new else "")
            else:
                line.append(str(self.tokenizer.decode([token])), style="bold green" if new else "")
        if self.live is None:
            console().print(line)
            return
        self.live.update(line, refresh=True)
        time.sleep(self.delay)
