"""The filter of Learn2PD: which predictions of a block are final, from the block's confidences alone; its training."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenmill.errors import LimitError
from tokenmill.models._state import load_network, save_network

_WATCHED = 0.9  # acceptance at which the share of wrong ones is reported, as the authors do


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterConfig:
    """What a filter is made of.

    Attributes:
        block_length: K, places of a block; a filter works for its own K alone.
        hidden: width between the layers.
        depth: linear layers, with a ReLU between two of them.
        threshold: acceptance that decoding uses unless it is told another one.
    """

    block_length: int = 32
    hidden: int = 32
    depth: int = 2
    threshold: float = 0.96

    def __post_init__(self) -> None:
        for name in ("block_length", "hidden", "depth"):
            value = getattr(self, name)
            if isinstance(value, bool) or value < 1:
                raise LimitError("FilterConfig", name, value, "at least 1")
        if not self.threshold >= 0:
            raise LimitError("FilterConfig", "threshold", self.threshold, "at least 0")


class BlockFilter(nn.Module):
    """Logits (..., K) that the predictions of a block are final, from its confidences (..., K) in [0, 1]."""

    def __init__(self, config: FilterConfig | None = None) -> None:
        super().__init__()
        self.config = made = config if config is not None else FilterConfig()
        widths = [made.block_length, *[made.hidden] * (made.depth - 1), made.block_length]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, confidence: Tensor) -> Tensor:
        """A block shorter than K is filled with zeros, and only its own places are answered.

        Raises:
            LimitError: more than K places.
        """
        k, n = self.config.block_length, confidence.shape[-1]
        if n > k:
            raise LimitError("BlockFilter", "block length", n, f"at most {k}, the filter's")
        weight = next(self.parameters())
        return self.layers(F.pad(confidence.to(weight), (0, k - n)))[..., :n].float()

    @property
    def flops(self) -> float:
        """Operations for one block: 2 for each weight of a matrix."""
        return 2.0 * sum(p.numel() for p in self.parameters() if p.dim() == 2)

    def save(self, folder: Path) -> None:
        """Write ``filter.safetensors`` and ``filter.json`` into a folder, each whole or not at all."""
        save_network(folder, "filter", self, asdict(self.config))

    @classmethod
    def load(cls, folder: str | Path) -> BlockFilter:
        """Read what `save` wrote.

        Raises:
            LimitError: the folder has no filter.
        """
        settings, weights = load_network("BlockFilter.load", folder, "filter")
        made = cls(FilterConfig(**settings))
        made.load_state_dict(weights)
        return made.eval()


@dataclass(frozen=True, slots=True)
class FilterRows:
    """What a filter learns from: N passes over blocks.

    Attributes:
        confidence: (N, K) float32; 0 behind the end of a short block.
        label: (N, K) bool, the prediction there equals the final token.
        prompt: (N,) int64, number of the prompt that a row comes from.
        block: (N,) int64, number of the block.
        step: (N,) int64, passes that the block had had before.
    """

    confidence: Tensor
    label: Tensor
    prompt: Tensor
    block: Tensor
    step: Tensor

    def __len__(self) -> int:
        return len(self.prompt)

    @classmethod
    def together(cls, parts: list[FilterRows]) -> FilterRows:
        """The rows of several batches of prompts; the prompts are numbered on."""
        first, shifted = 0, []
        for part in parts:
            shifted.append(part.prompt + first)
            first += int(part.prompt.max()) + 1 if len(part) else 0
        return cls(
            torch.cat([p.confidence for p in parts]),
            torch.cat([p.label for p in parts]),
            torch.cat(shifted),
            torch.cat([p.block for p in parts]),
            torch.cat([p.step for p in parts]),
        )


@dataclass(frozen=True, slots=True)
class FilterReport:
    """What a training reached.

    Attributes:
        rows: passes over blocks that it learned from.
        first_loss, last_loss: on those.
        validation_loss, test_loss: on held-out prompts.
        wrong_accepted: of the held-out predictions that an acceptance of 0.9 lets through, the share that is wrong.
        accepted: share of the held-out predictions that it lets through.
    """

    rows: int
    first_loss: float
    last_loss: float
    validation_loss: float
    test_loss: float
    wrong_accepted: float
    accepted: float


def split_rows(rows: FilterRows, seed: int) -> list[Tensor]:
    """Indices of the rows for training, validation and testing: 80, 10 and 10 % of the prompts, each prompt whole."""
    prompts = rows.prompt.unique()
    order = prompts[torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).to(prompts.device)]
    first, second = round(0.8 * len(order)), round(0.9 * len(order))
    return [torch.isin(rows.prompt, part).nonzero()[:, 0] for part in order.tensor_split([first, second])]


def train_filter(
    rows: FilterRows,
    config: FilterConfig,
    *,
    iterations: int = 40_000,
    rate: float = 3e-3,
    seed: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> tuple[BlockFilter, FilterReport]:
    """Train a filter on the rows of an oracle's replay: mean binary cross-entropy, all rows at once.

    Places that had been revealed before count as well, as in the authors' code.

    Args:
        rows: of `oracle_replay`.
        config: its ``block_length`` is the rows' own.
        iterations: of AdamW; the paper's number, a few thousand do for small data.
        rate: of learning.
        seed: of the weights and of the split by prompts.
        on_step: called with the iteration and the loss.

    Raises:
        LimitError: no rows, or rows of another block length.
    """
    k = config.block_length
    if not len(rows):
        raise LimitError("train_filter", "rows", 0, "at least 1", "Replay prompts that have an answer.")
    if rows.confidence.shape[1] != k:
        raise LimitError("train_filter", "block_length", k, f"{rows.confidence.shape[1]}, that of the rows")
    if bool(rows.label.all()) or not bool(rows.label.any()):
        warnings.warn("train_filter: all labels are equal, so the filter will be constant", stacklevel=2)
    train, validation, test = split_rows(rows, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = BlockFilter(config).to(rows.confidence.device)
    x, y = rows.confidence.float(), rows.label.float()
    optimizer = torch.optim.AdamW(made.parameters(), lr=rate)
    losses: list[Tensor] = []
    for step in range(iterations):
        optimizer.zero_grad(set_to_none=True)
        loss = F.binary_cross_entropy_with_logits(made(x[train]), y[train])
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if on_step is not None:
            on_step(step + 1, float(losses[-1]))
    return made.eval(), _report(made, x, y, validation, test, len(train), losses)


@torch.no_grad()
def _report(
    made: BlockFilter, x: Tensor, y: Tensor, validation: Tensor, test: Tensor, count: int, losses: list[Tensor]
) -> FilterReport:
    def loss(index: Tensor) -> float:
        return float(F.binary_cross_entropy_with_logits(made(x[index]), y[index])) if len(index) else float("nan")

    let = made(x[validation]).sigmoid() > _WATCHED
    wrong = float((let & (y[validation] == 0)).sum() / let.sum().clamp_min(1))
    first, last = (float(losses[at]) for at in (0, -1)) if losses else (float("nan"),) * 2
    accepted = float(let.float().mean()) if len(validation) else float("nan")
    return FilterReport(count, first, last, loss(validation), loss(test), wrong, accepted)
