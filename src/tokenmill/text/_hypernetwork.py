"""A small network that predicts the embedding of a merged token from the embeddings of its pieces."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenmill.errors import LimitError
from tokenmill.text._batch_merging import Token
from tokenmill.text._token_bytes import TokenBytes
from tokenmill.text._token_embedders import Rows, padded, tables, vocabulary_fingerprint

_WHERE = "HyperNetwork"
_PROBES = 16  # rows of the embedding that are kept, to know the model again


@dataclass(frozen=True, slots=True, kw_only=True)
class HyperNetworkConfig:
    """The shape of a `HyperNetwork`.

    Attributes:
        dim: D, width of the rows.
        tied: one matrix of tokens, or an output matrix besides.
        hidden: width of the network (paper: D of the model; 4,096 for Mistral).
        layers: transformer layers (paper: 3).
        heads: of attention.
        ff: width of the feed-forward layers (paper: 2 hidden).
        surface_maxlen: pieces of a token that are looked at (paper: 7); longer ones are cut.
        fingerprint: of the vocabulary.
        std: deviation of the input rows; of the output rows second.
    """

    dim: int
    tied: bool = True
    hidden: int = 256
    layers: int = 2
    heads: int = 4
    ff: int = 512
    surface_maxlen: int = 7
    fingerprint: str = ""
    std: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        for name in ("dim", "hidden", "layers", "heads", "ff", "surface_maxlen"):
            if getattr(self, name) < 1:
                raise LimitError(_WHERE, name, getattr(self, name), "at least 1")
        if self.hidden % self.heads:
            raise LimitError(_WHERE, "hidden", self.hidden, f"a multiple of heads={self.heads}")


class HyperNetwork(nn.Module):
    """Predicts rows as the mean of the pieces' rows plus what a bidirectional transformer over the pieces adds.

    The pieces' rows are projected by a residual block, get a position, go through the transformer, and the first place
    gives the difference to the mean (ZeTT predicts the row itself; with the difference an untrained network is the
    mean of the pieces). Rows of one piece are changed as well; `DynamicInputs` keeps those of known tokens.

    Args:
        config: its shape.
        input: (V, D) input rows of the model, which are not part of this module.
        output: (V, D) output rows of an untied model.
    """

    def __init__(self, config: HyperNetworkConfig, input: Tensor, output: Tensor | None = None) -> None:
        super().__init__()
        self.config = config
        self._tables: tuple[Tensor, Tensor | None] = (input.detach(), None if output is None else output.detach())
        wide = config.dim if config.tied else 2 * config.dim
        self.enter = nn.Linear(wide, config.hidden)
        self.widen = nn.Linear(config.hidden, config.ff)
        self.narrow = nn.Linear(config.ff, config.hidden)
        self.norm = nn.LayerNorm(config.hidden)
        self.position = nn.Parameter(torch.randn(config.surface_maxlen, config.hidden) * 0.02)
        layer = nn.TransformerEncoderLayer(
            config.hidden, config.heads, config.ff, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(
            layer, config.layers, nn.LayerNorm(config.hidden), enable_nested_tensor=False
        )
        self.leave = nn.Linear(config.hidden, wide)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)
        probe = torch.linspace(0, input.shape[0] - 1, _PROBES).long()
        self.register_buffer("probe", input.detach()[probe].float().clone())

    @classmethod
    def of(cls, model: Any, tokenizer: Any, **shape: Any) -> HyperNetwork:
        """An untrained network for a model and its tokenizer; `shape` are fields of `HyperNetworkConfig`."""
        found = tables(model)
        both = [t for t in (found.input, found.output) if t is not None]
        std = tuple(float(t.detach().float().std()) for t in (both[0], both[-1]))
        fingerprint = vocabulary_fingerprint(TokenBytes.of(tokenizer))
        dim = found.input.shape[1]
        tied = found.output is None
        config = HyperNetworkConfig(dim=dim, tied=tied, fingerprint=fingerprint, std=(std[0], std[1]), **shape)
        return cls(config, found.input, found.output)

    def forward(self, ids: Tensor, mask: Tensor) -> Rows:
        """Rows of U tokens, with gradients.

        Args:
            ids: (U, L) base tokens, L at most `surface_maxlen`.
            mask: (U, L) bool, what is a piece.
        """
        parts = [table[ids].float() for table in self._tables if table is not None]  # (U, L, D) each
        weights = (mask / mask.sum(1, keepdim=True).clamp(min=1))[..., None]
        means = [(part * weights).sum(1) for part in parts]
        scaled = torch.cat([part / s for part, s in zip(parts, self.config.std, strict=False)], dim=-1)
        x = self.enter(scaled)
        x = self.norm(x + F.gelu(self.narrow(F.gelu(self.widen(x)))))
        x = x + self.position[: ids.shape[1]]
        h = self.layers(x, src_key_padding_mask=~mask)[:, 0]  # (U, hidden)
        added = self.leave(h).split(self.config.dim, dim=-1)
        rows = [mean + s * delta for mean, s, delta in zip(means, self.config.std, added, strict=False)]
        return Rows(rows[0], rows[1] if len(rows) > 1 else None)

    @torch.no_grad()
    def embed(self, pieces: Sequence[Token], /) -> Rows:
        """Rows of U tokens in float32; tokens of more than `surface_maxlen` pieces are cut, with a warning."""
        longest = self.config.surface_maxlen
        if long := sum(len(token) > longest for token in pieces):
            warnings.warn(f"HyperNetwork: {long} tokens have more than {longest} pieces and are cut", stacklevel=2)
        ids, mask = (t.to(self.position.device) for t in padded(pieces, longest))
        if not len(pieces):
            empty = self.position.new_zeros(0, self.config.dim)
            return Rows(empty, None if self.config.tied else empty)
        return self(ids, mask)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``hypernetwork.json`` and ``hypernetwork.safetensors`` (half precision), each whole or not at all."""
        from safetensors.torch import save_file

        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        state = {name: t.half().contiguous() if name != "probe" else t for name, t in self.state_dict().items()}
        half = place / f"hypernetwork.{os.getpid()}.tmp"
        save_file(state, half)
        half.replace(place / "hypernetwork.safetensors")
        half.write_text(json.dumps(asdict(self.config), indent=2) + "\n", encoding="utf-8")
        half.replace(place / "hypernetwork.json")

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], model: Any, tokenizer: Any) -> HyperNetwork:
        """Read what `save_pretrained` wrote, for the model and tokenizer that it was trained for.

        Args:
            folder: a folder, or a model's name: ``"all-minilm-l6-v2"`` ships with this package, others lie in the
                user's cache when ``recipes/hypernetwork.py`` was run.
            model: whose rows are read; nothing in it is changed.
            tokenizer: its tokenizer.

        Raises:
            LimitError: nothing there, another vocabulary, or a model with other embeddings.
        """
        from safetensors.torch import load_file

        place = hypernetwork_folder(folder)
        if not (place / "hypernetwork.json").is_file():
            mend = "Train one: python recipes/hypernetwork.py --model NAME."
            raise LimitError(_WHERE, "folder", str(folder), "a folder that save_pretrained wrote", mend)
        data = json.loads((place / "hypernetwork.json").read_text(encoding="utf-8"))
        config = HyperNetworkConfig(**{**data, "std": tuple(data["std"])})
        own = vocabulary_fingerprint(TokenBytes.of(tokenizer))
        if own != config.fingerprint:
            limit = f"the vocabulary {config.fingerprint} that it was trained for"
            raise LimitError(_WHERE, "tokenizer", own, limit, "Train one for this tokenizer: recipes/hypernetwork.py.")
        found = tables(model)
        made = cls(config, found.input, found.output)
        state = load_file(place / "hypernetwork.safetensors")
        here = made.state_dict()["probe"]
        if here.shape != state["probe"].shape or (here - state["probe"]).abs().max() > 0.05 * state["probe"].std():
            raise LimitError(_WHERE, "model", type(model).__name__, "the model whose rows it was trained on")
        made.load_state_dict({name: t.float() for name, t in state.items()})
        return made.to(found.input.device).eval()


def hypernetwork_folder(name: str | os.PathLike[str]) -> Path:
    """Where the network of a model is: a folder as it is, an asset, or the user's cache."""
    from tokenmill.models._cache import cache_dir
    from tokenmill.models._catalog import ASSETS

    if Path(name).is_dir():
        return Path(name)
    shipped = ASSETS / f"{name}-hypernetwork"
    return shipped if shipped.is_dir() else cache_dir() / "hypernetworks" / str(name)
