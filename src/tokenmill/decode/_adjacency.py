"""The state of Token Recycling: for every token its likeliest successors, and how often they were right."""

from __future__ import annotations

import json
import os
import tempfile
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tokenmill.decode._plan import SEEN, Rows, Statistics
from tokenmill.decode._topk import top_tokens
from tokenmill.errors import LimitError, StoppedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class AdjacencyMatrix:
    """For each token the k successors that were likeliest when it was last seen (paper, section 3.1).

    It outlives a request: pass the same one again and the next text starts hot. It lives in host memory, so a step
    moves N x k ids from the model's device and nothing else.

    Args:
        vocab_size: V, the model's.
        k: successors that are kept, in [1, V].
        dtype: ``torch.int32`` or ``torch.int64``; V * k ids are stored.

    Attributes:
        table: (V, k), successors of each token, likeliest first; 0 where nothing was written yet.
        count: (V,) int64, how many successors of a row are known.
        shares: (V, k) float32, the share of each successor among the k when the row was written; above 1 for one
            that really followed in a prompt. Only ``tree="auto"`` reads them.
        statistics: how often a share was right, for ``tree="auto"``.

    Raises:
        LimitError: k outside [1, V] or another dtype.
    """

    def __init__(self, vocab_size: int, k: int = 8, dtype: torch.dtype = torch.int32) -> None:
        if vocab_size < 1:
            raise LimitError("AdjacencyMatrix", "vocab_size", vocab_size, "at least 1", "Give the model's vocabulary.")
        if not 1 <= k <= vocab_size:
            raise LimitError("AdjacencyMatrix", "k", k, f"in [1, V={vocab_size}]", "Lower it.")
        if dtype not in (torch.int32, torch.int64):
            raise LimitError(
                "AdjacencyMatrix", "dtype", dtype, "torch.int32 or torch.int64", "int32 halves the memory."
            )
        self.table = torch.zeros(vocab_size, k, dtype=dtype)
        self.count = torch.zeros(vocab_size, dtype=torch.int64)
        self.shares = torch.zeros(vocab_size, k)
        self.statistics = Statistics(k)
        self._busy = threading.Lock()

    @classmethod
    def for_model(cls, model: PreTrainedModel, k: int = 8) -> AdjacencyMatrix:
        """An empty matrix for the vocabulary of ``model`` (the width of its output layer)."""
        return cls(vocabulary(model), k)

    @property
    def vocab_size(self) -> int:
        return self.table.shape[0]

    @property
    def k(self) -> int:
        return self.table.shape[1]

    @property
    def filled(self) -> Tensor:
        """(V,) bool: rows that were written."""
        return self.count > 0

    def reset(self) -> None:
        """Forget everything."""
        self.table.zero_()
        self.count.zero_()
        self.shares.zero_()
        self.statistics = Statistics(self.k)

    @property
    def rows(self) -> Rows:
        """The tensors as arrays that share their memory."""
        return Rows(self.table.numpy(), self.shares.numpy(), self.count.numpy())

    def update(self, tokens: Tensor, logits: Tensor) -> None:
        """Overwrite the rows of ``tokens`` (N,) with the k best of ``logits`` (N, V), likeliest first.

        Of a token that occurs twice the later position wins, on every device.
        """
        values, successors = top_tokens(logits, self.k)
        self.write(tokens, successors, values)

    def write(self, tokens: Tensor, successors: Tensor, values: Tensor) -> None:
        """Overwrite the rows of ``tokens`` (N,) with ``successors`` (N, k); the later of two equal tokens wins.

        Args:
            tokens: (N,) int64.
            successors: (N, k) int64, likeliest first.
            values: (N, k) their logits.
        """
        tokens, successors, values = tokens.cpu(), successors.cpu(), values.cpu()
        self._check_ids(tokens)
        last = last_occurrences(tokens)
        self.table[tokens[last]] = successors[last].to(self.table.dtype)
        self.shares[tokens[last]] = values[last].float().softmax(1)
        self.count[tokens[last]] = self.k

    def put_first(self, tokens: Tensor, successors: Tensor) -> None:
        """Move ``successors`` (N,) to rank 0 of the rows of ``tokens`` (N,); the later of two equal tokens wins."""
        tokens, successors = tokens.cpu(), successors.cpu()
        self._check_ids(tokens)
        last = last_occurrences(tokens)
        tokens, first = tokens[last], successors[last].to(self.table.dtype)
        row, known = self.table[tokens], self.count[tokens]
        rank = torch.arange(self.k)
        # The new first one leaves its old place, or else the last known one falls off.
        stays = (row != first[:, None]) & (rank < known[:, None])
        order = (~stays).to(torch.int8).argsort(dim=1, stable=True)
        shifted = torch.cat([first[:, None], row.gather(1, order)], dim=1)[:, : self.k]
        self.table[tokens] = shifted
        share = self.shares[tokens].gather(1, order)
        self.shares[tokens] = torch.cat([torch.full_like(share[:, :1], SEEN), share], dim=1)[:, : self.k]
        self.count[tokens] = (stays.sum(1) + 1).clamp(max=self.k)

    def ranks(self, tokens: Tensor, successors: Tensor) -> Tensor:
        """Rank of each successor (N,) in the row of its token (N,); k where it is not among the known ones."""
        hit = self.table[tokens] == successors[:, None].to(self.table.dtype)
        hit &= torch.arange(self.k) < self.count[tokens][:, None]
        return torch.where(hit.any(1), hit.to(torch.int8).argmax(1), self.k)

    @contextmanager
    def claimed(self, where: str) -> Generator[None, None, None]:
        """Hold the matrix for one call; a second one at the same moment is refused."""
        if not self._busy.acquire(blocking=False):
            raise StoppedError(
                f"{where}: state is in use by another call. Give each concurrent call a matrix of its own."
            )
        try:
            yield
        finally:
            self._busy.release()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file; it appears under its name only when it is whole."""
        from safetensors.torch import save_file

        target = Path(path)
        about = {"kind": "tokenmill.AdjacencyMatrix", "statistics": json.dumps(self.statistics.to_dict())}
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        os.close(handle)
        try:
            save_file({"table": self.table, "count": self.count, "shares": self.shares}, name, metadata=about)
            Path(name).replace(target)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AdjacencyMatrix:
        """Read what `save` wrote.

        Raises:
            LimitError: the file is not such a matrix.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                if about.get("kind") != "tokenmill.AdjacencyMatrix":
                    raise LimitError("AdjacencyMatrix.load", "path", str(path), "a file that save() wrote")
                table, count, shares = (file.get_tensor(name) for name in ("table", "count", "shares"))
        except SafetensorError as error:
            raise LimitError("AdjacencyMatrix.load", "path", str(path), f"a safetensors file ({error})") from error
        fits = table.dim() == 2 and shares.shape == table.shape and count.shape == table.shape[:1]
        if not fits or not bool(((count >= 0) & (count <= table.shape[1])).all()):
            shapes = f"table {tuple(table.shape)}, count {tuple(count.shape)}, shares {tuple(shares.shape)}"
            raise LimitError(
                "AdjacencyMatrix.load", "path", str(path), f"a whole matrix, not {shapes}", "Save it anew."
            )
        matrix = cls(table.shape[0], table.shape[1], table.dtype)
        matrix.table, matrix.count, matrix.shares = table, count, shares
        matrix._check_ids(table)
        matrix.statistics = Statistics.from_dict(matrix.k, json.loads(about["statistics"]))
        return matrix

    def _check_ids(self, ids: Tensor) -> None:
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            bad = int(ids.max()) if int(ids.max()) >= self.vocab_size else int(ids.min())
            raise LimitError(
                "AdjacencyMatrix", "token id", bad, f"in [0, V={self.vocab_size})", "Use the matrix of this model."
            )


def last_occurrences(tokens: Tensor) -> Tensor:
    """Indices (M,) of the positions in ``tokens`` (N,) whose token does not come again, ascending."""
    if tokens.shape[0] > 256:
        flipped = np.unique(tokens.numpy()[::-1], return_index=True)[1]
        return torch.from_numpy(np.sort(tokens.shape[0] - 1 - flipped))
    later = (tokens[:, None] == tokens).triu(1).any(1)
    return (~later).nonzero().squeeze(1)


def vocabulary(model: PreTrainedModel) -> int:
    """The width of the model's output layer."""
    from tokenmill import hf

    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    return int(weight.shape[0]) if weight is not None else int(hf.text_config(model).vocab_size)
