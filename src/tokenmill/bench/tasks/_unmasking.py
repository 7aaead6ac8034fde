"""Parts of the task `diffuse`: batches of prompts in front of a model, rules and caches by name, files of prompts."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenmill.bench.task import Item, MethodSpec, NoSettings, Outcome
from tokenmill.errors import LimitError

if TYPE_CHECKING:
    from tokenmill.corpora import Exercise

WHERE = "bench diffuse"


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """Settings of rules that reveal a fixed number of places.

    Attributes:
        n: places of a pass.
    """

    n: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Confidence:
    """Settings of the threshold.

    Attributes:
        tau: least confidence; above 1 one place a pass.
    """

    tau: float = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Joint:
    """Settings of the factor.

    Attributes:
        f: larger reveals more.
    """

    f: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Nats:
    """Settings of the entropy bound.

    Attributes:
        gamma: sum of entropies in front of the last place.
    """

    gamma: float = 0.1


SETTINGS: dict[str, Any] = {
    "plain": NoSettings,
    "quota": Count,
    "random": Count,
    "entropy": Count,
    "margin": Count,
    "threshold": Confidence,
    "factor": Joint,
    "entropy-bound": Nats,
}


@dataclass(frozen=True, slots=True)
class GapExercise:
    """A gap in Python source, in the form of the other exercises; the prompt shows it as one null character."""

    id: str
    kind: str
    prompt: str
    answer: str
    gap: Any

    def check(self, text: str) -> bool:
        """Whether the gap is filled."""
        return self.gap.check(text)


@dataclass(slots=True)
class Filling:
    """A model with a decoder, and what one batch costs; counts are means over its prompts."""

    model: Any
    tokenizer: Any
    decoder: Any
    room: int
    infill: bool
    seed: int

    def run(self, item: Item) -> Outcome:
        """Decode one batch."""
        import torch

        from tokenmill import corpora

        ids, mask = self._inputs(item.content)
        made = self.decoder(self.seed * 1_000_003 + int(hashlib.sha256(item.id.encode()).hexdigest()[:8], 16))
        with torch.inference_mode():
            out = made.generate(self.model, ids, max_new_tokens=self.room, attention_mask=mask)
        trace, rows = made.trace, len(ids)
        if self.infill:
            gaps = [(len(one.gap.before), len(one.gap.gap)) for one in item.content]
            texts = [self.tokenizer.decode(row[at : at + n]) for row, (at, n) in zip(out, gaps, strict=True)]
        else:
            texts = [corpora.answer_text(self.tokenizer, row) for row in out[:, ids.shape[1] :].tolist()]
        counts = {
            "passes": sum(trace.row_calls) / rows,
            "positions": trace.positions / rows,
            "tokens": trace.tokens / rows,
            "flops": trace.flops / rows,
            "guide_positions": trace.guide_positions / rows,
        }
        return Outcome(texts, {name: value for name, value in counts.items() if value or "guide" not in name})

    def _inputs(self, content: tuple[Any, ...]) -> tuple[Any, Any]:
        """Ids (B, P), and the mask of left padding."""
        import torch

        if not self.infill:
            made = self.tokenizer([one.prompt for one in content], padding=True, return_tensors="pt")
            return made["input_ids"].to(self.model.device), made["attention_mask"].to(self.model.device)
        ids = torch.tensor([self.tokenizer(one.gap.text)["input_ids"] for one in content], device=self.model.device)
        for row, one in zip(ids, content, strict=True):
            start = len(one.gap.before)
            row[start : start + len(one.gap.gap)] = self.tokenizer.mask_token_id
        return ids, torch.ones_like(ids)


def rule(spec: MethodSpec) -> Any:
    """The rule of a baseline."""
    from tokenmill import diffuse

    params: dict[str, Any] = dict(spec.params)
    made: dict[str, Any] = {
        "plain": diffuse.Quota,
        "quota": diffuse.Quota,
        "random": diffuse.RandomReveal,
        "entropy": diffuse.Entropy,
        "margin": diffuse.Margin,
        "threshold": diffuse.Threshold,
        "factor": diffuse.Factor,
        "entropy-bound": diffuse.EntropyBound,
    }
    return made[spec.slug](**params)


def cache_of(name: str) -> Any:
    """The cache policy of a name, with windows that fit the embedded models; None for none."""
    from tokenmill import diffuse

    match name:
        case "prefix":
            return diffuse.PrefixCache()
        case "dual":
            return diffuse.DualCache()
        case "delayed":
            return diffuse.DelayedCache()
        case "free":
            return diffuse.FreeCache(block_size=16)
        case "sliding":
            return diffuse.FreeCache(policy="sliding", window=16)
        case "window":
            return diffuse.WindowCache(external=32, internal=8, refresh=8)
        case _:
            return None


def read_prompts(file: Path) -> list[Exercise]:
    """Prompts and answers of a file of JSON lines."""
    from tokenmill.corpora import Exercise

    if not file.is_file():
        raise LimitError(WHERE, "data", str(file), "mixed, long, hard, gaps, or a file of JSON lines")
    found = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        row = json.loads(line)
        lacking = [name for name in ("prompt", "answer") if not isinstance(row.get(name), str)]
        if lacking:
            raise LimitError(WHERE, f"line {number} of {file.name}", ", ".join(lacking), "given as text")
        found.append(Exercise(f"line {number}", row.get("kind", "text"), row["prompt"], row["answer"]))
    return found
