"""What all visual pruners share: inputs that are rewritten before the decoder, and stages inside it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from tokenmill.budget import check, to_count
from tokenmill.errors import LimitError, unknown_name
from tokenmill.hf.inputs import grow
from tokenmill.hf.shortened import Shortening, Stage, shortened
from tokenmill.hf.vision import PICTURE_INPUTS, Visual, check_type, encode, visual_mask
from tokenmill.prune._flops import prefill_flops
from tokenmill.prune._positions import compact_positions, cut_positions, full_positions
from tokenmill.trace import Trace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Positions = Literal["keep", "compact"]
Newline = Literal["compete", "keep"]
_SHARED = {"positions": ("keep", "compact"), "positions_inside": ("keep", "compact"), "newline": ("compete", "keep")}
# Tensors (B, T) with one entry a token, cut together with the ids.
ALONG = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


@dataclass(frozen=True, slots=True)
class Chosen:
    """What is left of one picture.

    Attributes:
        keep: (k,) int64, ascending, tokens of the picture that stay.
        features: (k, D) to put in their place; ``None`` leaves them as they are.
        scores: (k,) what later stages rank by; ``None`` when nothing does.
        asked: the count that the budget gave; ``None``: as many as stay.
    """

    keep: Tensor
    features: Tensor | None = None
    scores: Tensor | None = None
    asked: int | None = None


@dataclass(frozen=True, slots=True)
class Kept:
    """Report about one picture: its row, its kind, its tokens, which of them stay, and whether the budget was cut.

    ``asked`` is the count that the budget gave, more than ``tokens`` when it had to be clamped.
    """

    row: int
    kind: str
    tokens: int
    keep: Tensor
    asked: int


class PrunedInputs(dict[str, Any]):
    """Arguments for ``model(**pruned)`` or ``model.generate(**pruned)``, with what was done to them.

    Attributes:
        report: one `Kept` for each picture.
        scores: (B, T') of the visual tokens that are left, for stages inside the model; NaN at text.
    """

    def __init__(self, values: Mapping[str, Any], report: Sequence[Kept] = (), scores: Tensor | None = None) -> None:
        super().__init__(values)
        self.report = tuple(report)
        self.scores = scores

    def extend(self, sequences: Tensor) -> dict[str, Any]:
        """Arguments for a further turn in the same cache.

        Args:
            sequences: (B, T' + new) int64: these inputs' ``input_ids``, what was generated, and the new text.

        Returns:
            Ids, mask and positions of the whole text; hand them to ``generate`` or the model together with the cache
            (``past_key_values``). Positions go on after the last one, wherever the pruned prompt has gaps.

        Raises:
            LimitError: the sequences do not begin with these inputs.
        """
        ids: Tensor = self["input_ids"]
        if sequences.shape[1] < ids.shape[1] or not torch.equal(sequences[:, : ids.shape[1]], ids):
            raise LimitError(
                "PrunedInputs.extend",
                "sequences",
                tuple(sequences.shape),
                f"the pruned prompt (B, {ids.shape[1]}) with more text behind it",
            )
        running = {k: v for k, v in self.items() if k in (*ALONG[1:], "position_ids")}
        return {"input_ids": sequences, **grow(running, sequences.shape[1] - ids.shape[1])}


@dataclass(slots=True)
class PruneTrace(Trace):
    """Counts of a run with stages inside the model.

    Attributes:
        shortening: which tokens each stage left of the last prompt, and how long each layer was.
        model: whose formula `prefill_flops` uses.
    """

    shortening: Shortening = field(default_factory=Shortening)

    def kept(self) -> dict[int, int]:
        """Visual tokens left from each stage's layer on, over all rows."""
        return {layer: int(mask.sum()) for layer, mask in self.shortening.kept.items()}


class VisualPruner:
    """Base of the methods: `prepare` rewrites inputs, `attach` shortens layers, `generate` does both.

    A method that drops tokens before the decoder overrides `choose` (and says what of the tower it wants to see); one
    that drops them inside overrides `stages`. Subclasses are frozen dataclasses.
    """

    positions: Positions = "keep"

    def check_shared(self) -> None:
        """Refuse bad values of the settings that most pruners have, by name.

        Raises:
            LimitError: a bad ``keep``, ``positions``, ``positions_inside`` or ``newline``.
        """
        where = type(self).__name__
        if hasattr(self, "keep"):
            check(where, getattr(self, "keep"))  # noqa: B009 - the base has no such field
        for name, known in _SHARED.items():
            value = getattr(self, name, known[0])
            if value not in known:
                raise unknown_name(where, name, value, known)

    def prunes_inputs(self) -> bool:
        """Whether anything is dropped before the decoder; if not, `prepare` checks the inputs and hands them on."""
        return True

    def choose(self, model: PreTrainedModel, visual: Visual) -> Chosen:
        """What stays of one picture. The default keeps everything."""
        del model
        return Chosen(torch.arange(len(visual), device=visual.features.device))

    def stages(self, model: PreTrainedModel, pruned: PrunedInputs | None) -> Sequence[Stage]:
        """Stages inside the decoder; none by default."""
        del model, pruned
        return ()

    def tower_layers(self, model: PreTrainedModel) -> Sequence[int]:
        """Layers of the vision tower that `choose` looks into."""
        del model
        return ()

    def needs_projector_input(self) -> bool:
        """Whether `choose` looks at what goes into the projector."""
        return False

    def check(self, model: PreTrainedModel) -> None:
        """Refuse a model that the method cannot work on, before anything runs."""
        check_type(type(self).__name__, model)

    def prepare(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> PrunedInputs:
        """Encode the pictures, choose, and rewrite the inputs.

        Args:
            model: a Llava, LlavaNext, LlavaOnevision, InternVL or Qwen2.5-VL for conditional generation.
            inputs: arguments of its forward, from its processor; left-padded when rows differ in length.

        Returns:
            Arguments with the dropped tokens cut out of ids, masks and positions, and the kept features as
            ``mm_encoder_outputs``; rows are left-padded to one length. The inputs are not changed.

        Raises:
            LimitError: no picture, or placeholders that do not fit the features.
            UnsupportedError: a model that cannot be pruned, or that lacks what the method needs.
        """
        where = type(self).__name__
        self.check(model)
        if not self.prunes_inputs():
            return checked(where, model, inputs)
        with torch.no_grad():
            return _prepare(
                where,
                model,
                inputs,
                lambda visual: self.choose(model, visual),
                positions=self.positions,
                tower_layers=self.tower_layers(model),
                projector_input=self.needs_projector_input(),
            )

    @contextmanager
    def attach(self, model: PreTrainedModel, pruned: PrunedInputs | None = None) -> Generator[PruneTrace, None, None]:
        """Run this method's stages on every prompt that the model gets inside the ``with``.

        Args:
            model: the model.
            pruned: what `prepare` gave, for methods whose stages rank by scores from before the decoder.

        Yields:
            The trace: kept tokens and lengths for each layer.
        """
        self.check(model)
        trace = PruneTrace()
        stages = self.stages(model, pruned)
        if not stages:
            yield trace
            return
        inside = getattr(self, "positions_inside", self.positions)
        with shortened(type(self).__name__, model, stages, positions=inside) as trace.shortening:
            try:
                yield trace
            finally:
                seen = trace.shortening
                trace.model_calls, trace.positions = seen.calls, seen.positions
                if seen.lengths:
                    trace.flops = prefill_flops(model, seen.lengths)

    def generate(self, model: PreTrainedModel, inputs: Mapping[str, Any], **kwargs: Any) -> Any:
        """`prepare`, `attach`, and ``model.generate`` with these further arguments.

        The output begins with the pruned prompt.
        """
        pruned = self.prepare(model, inputs)
        with self.attach(model, pruned):
            return model.generate(**pruned, **kwargs)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]


def checked(where: str, model: PreTrainedModel, inputs: Mapping[str, Any]) -> PrunedInputs:
    """The inputs of a method that drops nothing before the decoder.

    Raises:
        LimitError: no pictures, or no placeholders.
        UnsupportedError: a model that cannot be pruned.
    """
    check_type(where, model)
    given = {name: value for name, value in inputs.items() if value is not None}
    ids = given.get("input_ids")
    count = int(visual_mask(model, ids).sum()) if isinstance(ids, Tensor) else 0
    pictures = sum(len(given[name]) for name in ("pixel_values", "pixel_values_videos") if name in given)
    if not count or not (pictures or given.get("mm_encoder_outputs")):
        raise LimitError(
            where,
            "inputs",
            f"{count} placeholders and {pictures} rows of pixels",
            "a prompt with pictures",
            "A text-only prompt has nothing to prune: call the model itself.",
        )
    return PrunedInputs(given)


def pick(where: str, visual: Visual, keep: float, newline: Newline, select: Callable[[Tensor, int], Tensor]) -> Chosen:
    """Choose within a budget: ``select(candidates, k)`` gives k positions among the candidates, in any order.

    Args:
        where: who asks, for messages.
        visual: the picture.
        keep: share or count of its tokens; a count above their number keeps them all.
        newline: whether LLaVA-NeXT's newlines compete or always stay, on top of the budget.
        select: gets the candidates' indices (n,) and k.
    """
    among = candidates(visual, newline)
    asked = to_count(where, keep, len(among))
    k = min(asked, len(among))
    chosen = among if k == len(among) else among[select(among, k)]
    return Chosen(with_newlines(visual, chosen, newline), asked=asked)


def candidates(visual: Visual, newline: Newline) -> Tensor:
    """(n,) int64: tokens among which a method chooses; with ``"keep"`` the newlines stand outside and always stay."""
    if newline == "keep":
        return (~visual.newline).nonzero()[:, 0]
    return torch.arange(len(visual), device=visual.features.device)


def with_newlines(visual: Visual, keep: Tensor, newline: Newline) -> Tensor:
    """Chosen tokens (k,) in any order -> ascending, with the newlines when they always stay."""
    if newline == "keep":
        keep = torch.cat([keep, visual.newline.nonzero()[:, 0]])
    return keep.sort().values


def _prepare(
    where: str,
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    choose: Callable[[Visual], Chosen],
    *,
    positions: Positions,
    tower_layers: Sequence[int],
    projector_input: bool,
) -> PrunedInputs:
    given = {name: value for name, value in inputs.items() if value is not None}
    if given.get("mm_encoder_outputs"):
        raise LimitError(where, "mm_encoder_outputs", "given", "absent", "Pass the pictures: these are pruned already.")
    encoded = encode(where, model, given, tower_layers=tower_layers, with_projector_input=projector_input)
    ids: Tensor = given["input_ids"]
    mask = given.get("attention_mask")
    if mask is None:
        mask = torch.ones_like(ids)
    full = full_positions(model, {**given, "attention_mask": mask})
    staying = mask.bool() & ~visual_mask(model, ids)  # (B, T)
    scores = torch.full(ids.shape, torch.nan, device=ids.device)
    features, report = [], []
    for visual in encoded.visuals:
        chosen = choose(visual)
        columns = visual.columns[chosen.keep]
        staying[visual.row, columns] = True
        if chosen.scores is not None:
            scores[visual.row, columns] = chosen.scores.float()
        features.append(visual.features[chosen.keep] if chosen.features is None else chosen.features)
        asked = len(chosen.keep) if chosen.asked is None else chosen.asked
        report.append(Kept(visual.row, visual.kind, len(visual), chosen.keep, asked))
    lost = mask.bool() & visual_mask(model, ids)
    if int(lost.sum()) != sum(len(v) for v in encoded.visuals):
        raise LimitError(
            where, "attention_mask", f"{int(lost.sum())} visible placeholders", f"{sum(map(len, encoded.visuals))}"
        )
    index, real = _left_padded(staying)
    made = {k: v for k, v in given.items() if k not in (*PICTURE_INPUTS, *ALONG, "position_ids")}
    for name in ALONG:
        if name in given:
            made[name] = given[name].gather(1, index)
    made["attention_mask"] = mask.gather(1, index) * real
    if not bool(real.all()):
        pad = getattr(model.config, "pad_token_id", None) or model.config.get_text_config().pad_token_id or 0
        made["input_ids"] = made["input_ids"].masked_fill(~real, pad)
        for name in ALONG[2:]:
            if name in made:
                made[name] = made[name].masked_fill(~real, 0)
    made["position_ids"] = cut_positions(full, index, real)
    if positions == "compact":
        visible = visual_mask(model, made["input_ids"]) & real
        made["position_ids"] = compact_positions(made["position_ids"], visible, real)
    made["mm_encoder_outputs"] = encoded.outputs(features)
    return PrunedInputs(made, report, scores.gather(1, index).masked_fill(~real, torch.nan))


def _left_padded(staying: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T) bool -> columns (B, T') ascending behind fillers on the left, and (B, T') bool, false at fillers."""
    length = int(staying.sum(1).max())
    order = staying.to(torch.uint8).sort(dim=1, stable=True).indices[:, staying.shape[1] - length :]
    return order, staying.gather(1, order)
