"""What one pass proposes: a token and its confidence for every place that the pass predicts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenmill.diffuse._canvas import Canvas


@dataclass(slots=True)
class Proposal:
    """The outcome of a pass over B rows, as a rule sees it. Drafts and confidences are in the canvas.

    Attributes:
        canvas: the live rows, before anything of this pass is revealed.
        logits: (B, Q, V) float32, minus infinity at the mask id.
        targets: (B, Q) int64, the place that each row of logits predicts.
        valid: (B, Q) bool, false where the batch is padded.
        eligible: (B, S) bool, places that may be revealed: masked, predicted by this pass, in or before the current
            block, and allowed by the cache policy.
    """

    canvas: Canvas
    logits: Tensor
    targets: Tensor
    valid: Tensor
    eligible: Tensor

    @property
    def confidence(self) -> Tensor:
        """(B, S) float32: probability of the draft at each place, from the latest pass that predicted it."""
        return self.canvas.confidence

    @property
    def drafts(self) -> Tensor:
        """(B, S) int64: the token that would be revealed at each place."""
        return self.canvas.drafts

    def spread(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """Values by row of logits (B, Q, ...) as values by place (B, S, ...); ``fill`` where nothing was predicted."""
        shape = (values.shape[0], self.canvas.size, *values.shape[2:])
        return put(values.new_full(shape, fill), self.targets, self.valid, values)

    def entropy(self) -> Tensor:
        """(B, S) float32: entropy of the prediction in nats; 0 where nothing was predicted."""
        logp = self.logits.log_softmax(-1)
        return self.spread(-(logp.exp() * logp.masked_fill(logp == -torch.inf, 0.0)).sum(-1))

    def margin(self) -> Tensor:
        """(B, S) float32: probability of the likeliest token minus that of the second."""
        best = self.logits.topk(min(2, self.logits.shape[-1]), -1).values
        p = (best - self.logits.logsumexp(-1, keepdim=True)).exp()
        return self.spread(p[..., 0] - p[..., 1:].sum(-1))

    def top(self, count: int) -> Tensor:
        """(B, S, count) float32: the largest probabilities, descending; 0 where nothing was predicted."""
        best = self.logits.topk(min(count, self.logits.shape[-1]), -1).values
        p = (best - self.logits.logsumexp(-1, keepdim=True)).exp()
        return self.spread(torch.nn.functional.pad(p, (0, count - p.shape[-1])))


def put(store: Tensor, index: Tensor, valid: Tensor, values: Tensor) -> Tensor:
    """A copy of ``store`` (B, S, ...) with ``values`` (B, Q, ...) at the columns ``index`` (B, Q) that are valid."""
    size = store.shape[1]
    wide = torch.cat([store, store[:, :1]], dim=1)  # one more column takes what is not valid
    index = torch.where(valid, index, size).view(*index.shape, *([1] * (store.dim() - 2))).expand_as(values)
    return wide.scatter(1, index, values)[:, :size]
