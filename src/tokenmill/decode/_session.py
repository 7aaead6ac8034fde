"""One sequence that is being decoded: prefill, forwards over drafts, exact stops, and what is kept."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import FloatTensor, LongTensor, Tensor

from tokenmill import hf
from tokenmill.decode._request import DecodeTrace, Request, check_request
from tokenmill.decode._tree import Tree
from tokenmill.errors import LimitError, NonFiniteError, StoppedError, UnsupportedError


class Session:
    """A sequence under way. Tokens are committed; all but the last committed one (the root) are in the cache.

    Args:
        where: the method, for messages.
        request: what is to be decoded.
        trace: filled while the run goes on.
        tree: drafts will branch, so attention must take a mask of ancestors.

    Raises:
        UnsupportedError: more than one row, beams, an encoder-decoder model, a cache that cannot drop rows,
            attention that cannot take a tree mask.
        LimitError: an empty prompt, or one longer than the model's positions.
    """

    def __init__(self, where: str, request: Request, trace: DecodeTrace, *, tree: bool = True) -> None:
        check_request(where, request)
        self.where, self.request, self.trace = where, request, trace
        self.model = request.model
        self.kinds = hf.layer_kinds(where, self.model)
        self.form = hf.mask_form(where, self.model) if tree else ""
        self.cache = hf.check_cache(where, request.model_kwargs.get("past_key_values"))
        ids = request.input_ids
        self.prompt_length = ids.shape[1]
        room = max(int(request.generation_config.max_length or 0), self.prompt_length) - self.prompt_length
        self.ids = torch.cat([ids, ids.new_zeros(1, room + 1)], dim=1)
        self.length = self.prompt_length
        self.room = room
        self.finished = room == 0
        limit = getattr(hf.text_config(self.model), "max_position_embeddings", None)
        self.position_limit = int(limit) if limit else None
        self._scores: list[Tensor] = []
        self._logits: list[Tensor] = []
        mask = request.model_kwargs.get("attention_mask")
        self._past = None if mask is None or mask.dim() != 2 or bool(mask.all()) else mask[0].bool()
        self._last: Tensor | None = None

    @property
    def sequence(self) -> Tensor:
        """(1, T) int64: the committed tokens, prompt included."""
        return self.ids[:, : self.length]

    @property
    def root(self) -> Tensor:
        """(1,) int64: the last committed token, the only one that is not cached."""
        return self.ids[0, self.length - 1 : self.length]

    @property
    def device(self) -> torch.device:
        return self.ids.device

    @property
    def depth_limit(self) -> int:
        """How deep a draft may go: one token is always added by the target, and positions end somewhere."""
        left = self.room - (self.length - self.prompt_length)
        depth = left - 1
        if self.position_limit is not None and self._last is not None:
            depth = min(depth, self.position_limit - 2 - int(self._last.max()))
        return max(depth, 0)

    def prefill(self) -> Tensor:
        """Run the prompt as plain `generate` does; return the logits (1, V) behind its last token."""
        request = self.request
        past = self.cache.get_seq_length()
        whole = request.input_ids.shape[1]
        fresh = whole - past if 0 < past < whole else None
        inputs = cast("Any", self.model).prepare_inputs_for_generation(
            request.input_ids, next_sequence_length=fresh, is_first_iteration=True, **request.model_kwargs
        )
        if request.token_streamer is not None:
            request.token_streamer.put(request.input_ids.cpu())
        out = self.model(**inputs, return_dict=True)
        seen = self.cache.get_seq_length()
        positions = inputs.get("position_ids")
        last = torch.tensor([[seen - 1]], device=self.device) if positions is None else positions
        self._last = hf.last_position(last)
        self.trace.model_calls += 1
        self.trace.positions += seen - past
        return out.logits[:, -1]

    def forward(self, tokens: Tensor, tree: Tree) -> Tensor:
        """One forward of the target over a draft.

        Args:
            tokens: (N,) int64, the root first.
            tree: N nodes.

        Returns:
            (N, V) logits, row i behind the path to node i. The cache grows by N rows until `commit`.
        """
        n = tokens.shape[0]
        length = self.cache.get_seq_length()
        if n == 1:
            # The very call of plain decoding.
            mask = None if self._past is None else self._past_mask(length + 1).long()[None]
        else:
            mask = hf.tree_masks(
                self.model,
                self.cache,
                tree.ancestors,
                tree.depth,
                kinds=self.kinds,
                form=self.form,
                past=None if self._past is None else self._past_mask(length),
            )
        out = self.model(
            input_ids=tokens[None],
            attention_mask=mask,
            position_ids=hf.next_positions(self.last, tree.depth + 1),
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
        )
        self.trace.model_calls += 1
        self.trace.positions += n
        self.trace.drafted += n - 1
        return out.logits[0]

    @property
    def last(self) -> Tensor:
        """Position of the last cached token: (1, 1) or (R, 1, 1)."""
        if self._last is None:
            raise StoppedError(f"{self.where}: prefill() comes before the first draft.")
        return self._last

    def _past_mask(self, length: int) -> Tensor:
        past = self._past
        if past is None or past.shape[0] >= length:
            return torch.ones(length, dtype=torch.bool, device=self.device) if past is None else past[:length]
        return torch.cat([past, past.new_ones(length - past.shape[0])])

    @property
    def plain_scores(self) -> bool:
        """No processor changes the logits: a row's argmax is the logits' own."""
        return len(self.request.logits_processor) == 0

    def process(self, logits: Tensor, tree: Tree, tokens: Tensor) -> Tensor:
        """The scores that plain decoding would see behind each node, processors applied per depth.

        Args:
            logits: (N, V).
            tree: N nodes.
            tokens: (N,) int64.

        Returns:
            (N, V) float32; ``logits`` itself when there is no processor.
        """
        if self.plain_scores:
            return logits
        scores = logits.float()
        done = torch.empty_like(scores)
        before = self.ids[:, : self.length - 1]
        for depth in range(int(tree.depth[-1]) + 1):
            level = (tree.depth == depth).nonzero().squeeze(1)
            paths = tokens[tree.paths_to(level)]  # (M, depth + 1)
            ids = torch.cat([before.expand(level.shape[0], -1), paths], dim=1)
            done[level] = self.request.logits_processor(cast("LongTensor", ids), cast("FloatTensor", scores[level]))
        return done

    def check_finite(self, highest: Tensor) -> None:
        """Refuse a forward whose rows have no finite maximum.

        Args:
            highest: (N,), the largest logit of each row; a NaN anywhere in a row is a NaN here.

        Raises:
            NonFiniteError: with the tokens so far in ``.partial``.
        """
        if not bool(torch.isfinite(highest).all()):
            value = highest[~torch.isfinite(highest)][0].item()
            raise NonFiniteError(
                f"{self.where}: the model's logits hold {value} at call {self.trace.model_calls}, "
                f"but every row must have a finite maximum. {self.trace.tokens} new tokens are in .partial.",
                partial=list(self.trace.tokens_so_far),
            )

    @property
    def plain_greedy(self) -> bool:
        """The next token is the argmax of the raw logits."""
        return self.plain_scores and not self.request.generation_config.do_sample

    @property
    def root_tree(self) -> Tree:
        """The tree of nothing but the root."""
        return Tree.root(self.device)

    def choose(self, scores: Tensor) -> Tensor:
        """The token (N,) emitted behind each row of ``scores`` (N, V): the argmax, or one draw from its law."""
        if not self.request.generation_config.do_sample:
            return scores.argmax(1)
        law = scores.float().softmax(1)
        return torch.multinomial(law, 1, generator=self.request.generator).squeeze(1)

    def laws(self, scores: Tensor) -> Tensor:
        """(N, V) float64: the law of the token emitted behind each row; one-hot without sampling."""
        if self.request.generation_config.do_sample:
            return scores.double().softmax(1)
        return torch.nn.functional.one_hot(scores.argmax(1), scores.shape[1]).double()

    def start(self, token: Tensor, scores: Tensor, logits: Tensor) -> None:
        """Commit the first new token (1,), whose logits came from the prefill."""
        self._emit(token, scores, logits)

    def forward_rows(self, tokens: Tensor) -> Tensor:
        """One forward of the target over K drafts as K rows, without a tree mask.

        Args:
            tokens: (K, N) int64, the root first in each row.

        Returns:
            (K, N, V) logits. The cache has K rows, and N columns more, until `commit` with ``row``.
        """
        k, n = tokens.shape
        past = self._past
        length = self.cache.get_seq_length()
        self.cache.batch_repeat_interleave(k)
        positions = hf.next_positions(self.last, torch.arange(1, n + 1, device=self.device))
        out = self.model(
            input_ids=tokens,
            attention_mask=None if past is None else self._past_mask(length + n).long().expand(k, -1),
            position_ids=positions.expand(*positions.shape[:-2], k, n),
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
        )
        self.trace.model_calls += 1
        self.trace.positions += k * n
        self.trace.drafted += k * (n - 1)
        return out.logits

    def commit(
        self, nodes: Tensor, emitted: Tensor, scores: Tensor, logits: Tensor, row: tuple[int, int] | None = None
    ) -> Tensor:
        """Keep an accepted path and what the target emitted behind each of its nodes.

        Args:
            nodes: (A,) int64, accepted nodes from the root down, ascending.
            emitted: (A,) int64, the token emitted behind each node.
            scores, logits: (N, V) rows by node.
            row: behind `forward_rows`, the row that holds the path, and the columns that it was given.

        Returns:
            ``nodes``, cut where the sequence stopped.
        """
        n = scores.shape[0]
        count = self._emit(emitted, scores[nodes], logits[nodes])
        nodes = nodes[:count]
        if row is None:
            hf.keep_rows(self.cache, n, nodes)
        else:
            self.cache.batch_select_indices(torch.tensor([row[0]], device=self.device))
            hf.keep_rows(self.cache, row[1], torch.arange(count, device=self.device))
        self._last = self.last + count
        self.trace.steps.append(count)
        self.trace.accepted += min(count, emitted.shape[0] - 1)
        return nodes

    def _emit(self, tokens: Tensor, scores: Tensor, logits: Tensor) -> int:
        """Append tokens until the sequence stops; return how many were appended."""
        config, start = self.request.generation_config, self.length
        values = tokens.tolist()[: self.room - (start - self.prompt_length)]
        self.ids[0, start : start + len(values)] = tokens[: len(values)]
        count = 0
        for value in values:
            row = scores[count : count + 1]
            count += 1
            self.length = start + count
            self.trace.tokens_so_far.append(value)
            self.trace.tokens += 1
            if self.request.token_streamer is not None:
                self.request.token_streamer.put(torch.tensor([value]))
            if bool(self.request.stopping_criteria(cast("LongTensor", self.sequence), cast("Any", row)).all()):
                self.finished = True
                break
        if self.length - self.prompt_length >= self.room:
            self.finished = True
        if config.return_dict_in_generate and config.output_scores:
            self._scores += list(scores[:count].float().split(1))
        if config.return_dict_in_generate and config.output_logits:
            self._logits += list(logits[:count].float().split(1))
        return count

    def result(self) -> Any:
        """What `generate` returns: (1, T) int64, or a GenerateDecoderOnlyOutput if the caller asked for one."""
        from transformers.generation.utils import GenerateDecoderOnlyOutput

        config = self.request.generation_config
        if not config.return_dict_in_generate:
            return self.sequence
        return GenerateDecoderOnlyOutput(
            sequences=self.sequence,  # pyright: ignore[reportArgumentType]
            scores=tuple(self._scores) if config.output_scores else None,  # pyright: ignore[reportArgumentType]
            logits=tuple(self._logits) if config.output_logits else None,  # pyright: ignore[reportArgumentType]
            past_key_values=self.cache,
        )


@contextmanager
def decoding(where: str, request: Request, trace: DecodeTrace, tree: bool = True) -> Generator[Session, None, None]:
    """A session whose errors carry what was produced."""
    try:
        yield Session(where, request, trace, tree=tree)
    except (LimitError, UnsupportedError, StoppedError) as error:
        error.partial = list(trace.tokens_so_far) if error.partial is None else error.partial
        raise
