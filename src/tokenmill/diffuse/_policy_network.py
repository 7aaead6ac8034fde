"""The network of an unmasking policy: one transformer block that reads confidences, masks and the share of time."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenmill.errors import LimitError
from tokenmill.models._state import load_network, save_network

if TYPE_CHECKING:
    from tokenmill.diffuse._proposal import Proposal

_ROPE_BASE = 10_000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyConfig:
    """What an unmasking policy's network is made of; the defaults are the paper's.

    Attributes:
        width: of the block.
        mlp: width of its feed-forward part.
        heads: of its attention.
        time_width: of the embedding of time.
        confidences: how many of a place's largest probabilities are read.
        period: longest period of the embedding of time; 1 makes all its frequencies equal, as in the authors' code.
        start: logit that a new policy gives every place; sigmoid(-2) reveals one in eight.
        full_context: the network sees the whole answer; otherwise the current block alone.
    """

    width: int = 128
    mlp: int = 512
    heads: int = 2
    time_width: int = 128
    confidences: int = 1
    period: float = 1.0
    start: float = -2.0
    full_context: bool = True

    def __post_init__(self) -> None:
        for name in ("width", "mlp", "heads", "time_width", "confidences"):
            if getattr(self, name) < 1:
                raise LimitError("PolicyConfig", name, getattr(self, name), "at least 1")
        if self.width % (2 * self.heads):
            raise LimitError("PolicyConfig", "width", self.width, f"a multiple of 2 heads = {2 * self.heads}")
        if self.time_width % 2:
            raise LimitError("PolicyConfig", "time_width", self.time_width, "even")
        if not self.period >= 1:
            raise LimitError("PolicyConfig", "period", self.period, "at least 1")
        if not abs(self.start) < 1e3:
            raise LimitError("PolicyConfig", "start", self.start, "a logit in (-1000, 1000)")


class PolicyNetwork(nn.Module):
    """Logit of revealing each place, from what a pass says about all of them.

    A block in the manner of DiT: the mask bit of a place and the time modulate it. The gates are 1 + a, so a network
    whose modulation is zero is a plain pre-norm block, and that is how it starts.
    """

    def __init__(self, config: PolicyConfig | None = None) -> None:
        super().__init__()
        self.config = made = config if config is not None else PolicyConfig()
        d = made.width
        self.mask_embedding = nn.Embedding(2, d)
        self.time = nn.Sequential(nn.Linear(made.time_width, d), nn.SiLU(), nn.Linear(d, d))
        self.confidence = nn.Linear(made.confidences, d)
        self.modulation = nn.Linear(d, 6 * d)
        self.norm_attention, self.norm_mlp, self.norm_out = nn.LayerNorm(d), nn.LayerNorm(d), nn.LayerNorm(d)
        self.query, self.key, self.value, self.mix = (nn.Linear(d, d) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(d, made.mlp), nn.GELU(), nn.Linear(made.mlp, d))
        self.out = nn.Linear(d, 1)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        nn.init.constant_(self.out.bias, made.start)

    def forward(self, masked: Tensor, confidence: Tensor, time: Tensor) -> Tensor:
        """Logits (..., L) float32.

        Args:
            masked: (..., L) bool, true where a mask stands.
            confidence: (..., L, p) in [0, 1], the p largest probabilities of each place, descending.
            time: (..., 1) in [0, 1], passes taken over length of the answer.

        Raises:
            LimitError: other shapes.
        """
        p = self.config.confidences
        if confidence.shape != (*masked.shape, p):
            raise LimitError("PolicyNetwork", "confidence", tuple(confidence.shape), f"{(*masked.shape, p)}")
        if time.shape != (*masked.shape[:-1], 1):
            raise LimitError("PolicyNetwork", "time", tuple(time.shape), f"{(*masked.shape[:-1], 1)}")
        shape = masked.shape
        masked, time = masked.reshape(-1, shape[-1]), time.reshape(-1, 1)
        h = self.confidence(confidence.reshape(-1, shape[-1], p).to(self.out.weight))  # (N, L, D)
        condition = self.mask_embedding(masked.long()) + self.time(self._clock(time))[:, None]
        scale1, shift1, gate1, scale2, shift2, gate2 = self.modulation(condition).chunk(6, -1)
        h = h + (1 + gate1) * self._attend(self.norm_attention(h) * (1 + scale1) + shift1)
        h = h + (1 + gate2) * self.mlp(self.norm_mlp(h) * (1 + scale2) + shift2)
        return self.out(self.norm_out(h))[..., 0].float().reshape(shape)

    def _clock(self, time: Tensor) -> Tensor:
        """Embedding (N, time_width) of time (N, 1)."""
        half = self.config.time_width // 2
        speed = self.config.period ** (-torch.arange(half, device=time.device) / half)
        angle = time.float() * speed
        return torch.cat([angle.cos(), angle.sin()], -1).to(self.out.weight)

    def _attend(self, x: Tensor) -> Tensor:
        """Bidirectional attention (N, L, D) with rotary positions counted from the first place."""
        n, length, d = x.shape
        heads = self.config.heads

        def split(y: Tensor) -> Tensor:
            return y.view(n, length, heads, d // heads).transpose(1, 2)

        q, k = rotate(split(self.query(x))), rotate(split(self.key(x)))
        mixed = F.scaled_dot_product_attention(q, k, split(self.value(x)))
        return self.mix(mixed.transpose(1, 2).reshape(n, length, d))

    def flops(self, length: int) -> float:
        """Operations for one row of ``length`` places: 2 for each weight of a matrix, and those of attention."""
        weights = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        return 2.0 * weights * length + 4.0 * self.config.width * length**2

    def save(self, folder: Path) -> None:
        """Write ``policy.safetensors`` and ``policy.json`` into a folder, each whole or not at all."""
        save_network(folder, "policy", self, asdict(self.config))

    @classmethod
    def load(cls, folder: str | Path, *, full_context: bool | None = None) -> PolicyNetwork:
        """Read what `save` wrote.

        Args:
            folder: where it lies.
            full_context: what the caller needs; a policy that was trained with the other view is refused.

        Raises:
            LimitError: the folder has no policy, or one with the other view.
        """
        settings, weights = load_network("PolicyNetwork.load", folder, "policy")
        config = PolicyConfig(**settings)
        if full_context is not None and full_context != config.full_context:
            mend = "Train a policy for this view, or load it with its own."
            raise LimitError(
                "PolicyNetwork.load", "full_context", full_context, f"{config.full_context}, as it was trained", mend
            )
        made = cls(config)
        made.load_state_dict(weights)
        return made.eval()


def rotate(x: Tensor) -> Tensor:
    """Rotary positions 0 .. L - 1 on the pairs (even, odd) of the channels of x (..., L, D)."""
    length, d = x.shape[-2:]
    speed = _ROPE_BASE ** (-torch.arange(0, d, 2, device=x.device, dtype=torch.float32) / d)
    angle = torch.arange(length, device=x.device, dtype=torch.float32)[:, None] * speed  # (L, D / 2)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def policy_inputs(proposal: Proposal, config: PolicyConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a policy sees of a pass.

    Returns:
        masked (B, L) bool, confidences (B, L, p) and time (B, 1) as `PolicyNetwork` takes them, and the places
        (B, L) int64 of the L columns; S for one that stands for nothing.
    """
    canvas = proposal.canvas
    length = canvas.size - canvas.prompt
    start = canvas.places[:, canvas.prompt :].expand(len(canvas), -1)
    if not config.full_context:
        offset = torch.arange(min(canvas.block_length, length), device=canvas.x.device)
        start = canvas.start.clamp_min(canvas.prompt)[:, None] + offset
        start = torch.where(start < canvas.stop[:, None], start, canvas.size)
    confidence = canvas.confidence[..., None] if config.confidences == 1 else proposal.top(config.confidences)
    wide = F.pad(confidence, (0, 0, 0, 1))  # one more place, which stands for nothing
    masks = (canvas.x == canvas.mask_id) & canvas.real  # those of blocks that were given up as well
    masked = F.pad(masks, (0, 1)).gather(1, start)
    seen = wide.gather(1, start[..., None].expand(-1, -1, config.confidences))
    time = (canvas.passes / max(length, 1)).clamp(max=1.0)[:, None].float()
    return masked, seen, time, start
