"""What a rule is: it says which places a pass reveals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from tokenmill.diffuse._canvas import Canvas
    from tokenmill.diffuse._proposal import Proposal


@dataclass(slots=True)
class Reveal:
    """What a rule decides after a pass.

    Attributes:
        places: (B, S) bool, the places to reveal; those that are not eligible are left out.
        cut: (B,) int64, the last place that a row keeps, -1 for all of them. Tokens are written first, then the row is
            cut, for good.
        tokens: (B, S) int64, what to write instead of the drafts.
        leave: (B,) bool, give up the current block: its masks stay, and the row goes on to the next block.
    """

    places: Tensor
    cut: Tensor | None = None
    tokens: Tensor | None = None
    leave: Tensor | None = None


class RuleRun(Protocol):
    """A rule at work on one batch; a rule without state is its own run."""

    def reveal(self, proposal: Proposal, /) -> Reveal | Tensor: ...

    def select(self, index: Tensor, /) -> None: ...


class RevealRule:
    """Base of rules: frozen dataclasses that say which places a pass reveals.

    A rule without state has `reveal`. A rule with state has `begin`, which makes its `RuleRun` for a batch.
    """

    leaves_masks: bool = False
    """The rule may give up blocks, so that masks are left at the end."""

    def begin(self, canvas: Canvas) -> RuleRun:  # noqa: ARG002 - for those with state
        """The rule at work on the rows of ``canvas``, before the first pass."""
        return self

    def reveal(self, proposal: Proposal) -> Reveal | Tensor:
        """Which places to reveal: (B, S) bool, or a `Reveal`."""
        raise NotImplementedError(f"{type(self).__name__} has neither reveal() nor begin()")

    def select(self, index: Tensor) -> None:
        """Keep the state of the rows ``index`` (R,); called when rows are finished."""
