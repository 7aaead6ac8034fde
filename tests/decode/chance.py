"""Exact laws of tiny models, a test of samples against them, and randomness that is enumerated instead of drawn."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor
from transformers import LogitsProcessorList

from tokenmill.decode import _transport

Law = dict[tuple[int, ...], float]


@torch.no_grad()
def next_laws(model: Any, ids: Any, processors: LogitsProcessorList | None = None) -> Tensor:
    """(B, V) float64: the law of the token behind each row of ``ids`` (B, T), after the processors."""
    scores = model(input_ids=ids).logits[:, -1].float()
    return (processors(ids, scores) if processors else scores).double().softmax(1)


def joint_law(model: Any, prompt: Tensor, tokens: int, processors: LogitsProcessorList | None = None) -> Law:
    """The law of the next ``tokens`` tokens behind ``prompt`` (1, T), by enumeration."""
    vocab = model.config.vocab_size
    law: Law = {(): 1.0}
    for depth in range(tokens):
        heads = torch.tensor(list(law)).view(len(law), depth)
        rows = next_laws(model, torch.cat([prompt.expand(len(law), -1), heads.long()], dim=1), processors)
        law = {
            (*head, token): share * float(row[token])
            for (head, share), row in zip(law.items(), rows, strict=True)
            for token in range(vocab)
        }
    return law


def chi_square(counts: dict[tuple[int, ...], int], law: Law) -> float:
    """p-value of counted samples against a law; outcomes that are expected fewer than 5 times are one bin.

    A sample that the law rules out makes the p-value 0.
    """
    total = sum(counts.values())
    if any(law.get(outcome, 0.0) <= 0 for outcome in counts):
        return 0.0
    common = [o for o, share in law.items() if share * total >= 5]
    seen, expected = [counts.get(o, 0) for o in common], [law[o] * total for o in common]
    rest = total - sum(expected)
    if rest > 1e-6 * total:
        seen, expected = [*seen, total - sum(seen)], [*expected, rest]
    scale = sum(seen) / sum(expected)
    return float(stats.chisquare(seen, [e * scale for e in expected]).pvalue)


def remember_plans(patch: pytest.MonkeyPatch) -> None:
    """Let `kseq_select` solve each pair of laws once: the bisection is what makes many samples slow."""
    solve, known = _transport.kseq_plan, {}

    def plan(draft: Tensor, target: Tensor, k: int) -> Any:
        key = (draft.numpy().tobytes(), target.numpy().tobytes(), k)
        if key not in known:
            known[key] = solve(draft, target, k)
        return known[key]

    patch.setattr(_transport, "kseq_plan", plan)


class Enumerated:
    """Every outcome of a procedure that throws coins and draws tokens, with its exact probability.

    `torch.rand` and `torch.multinomial` are replaced while it runs. The coins of one `kseq_select` matter only up to
    the first draft that is accepted, so the outcomes are: draft j is the first one, or none is.
    """

    def __init__(self) -> None:
        self._script: list[int] = []
        self._place = 0
        self._widths: list[int] = []
        self.share = 1.0
        self._accept: Tensor | None = None

    def outcomes(self, run: Callable[[], Any]) -> Iterator[tuple[Any, float]]:
        """Each result of ``run`` with its probability; outcomes without mass are left out."""
        self._script = []
        while True:
            self._place, self._widths, self.share = 0, [], 1.0
            with self._patched():
                result = run()
            if self.share > 0:
                yield result, self.share
            # The next script in lexicographic order, like an odometer whose wheels differ in size.
            script = (self._script + [0] * len(self._widths))[: len(self._widths)]
            while script and script[-1] == self._widths[len(script) - 1] - 1:
                script.pop()
            if not script:
                return
            script[-1] += 1
            self._script = script

    def _pick(self, shares: list[float]) -> int:
        possible = [i for i, share in enumerate(shares) if share > 0]
        index = self._script[self._place] if self._place < len(self._script) else 0
        self._place += 1
        self._widths.append(len(possible))
        self.share *= shares[possible[index]]
        return possible[index]

    def _coins(self, k: int, **_: Any) -> Tensor:
        assert self._accept is not None
        accept = self._accept.tolist()
        shares, left = [], 1.0
        for chance in accept:
            shares.append(left * chance)
            left *= 1 - chance
        first = self._pick([*shares, left])
        # Just below and just above the limit is where a coin decides; 0 and 1 are enough.
        return torch.tensor([1.0 if i < first else 0.0 for i in range(k)], dtype=torch.float64)

    def _draw(self, law: Tensor, n: int, **_: Any) -> Tensor:
        return torch.tensor([self._pick((law / law.sum()).tolist())])

    @contextmanager
    def _patched(self) -> Generator[None, None, None]:
        plan = _transport.kseq_plan
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "rand", self._coins)
            patch.setattr(torch, "multinomial", self._draw)
            select = _transport.kseq_select

            def watched(tokens: Tensor, draft: Tensor, target: Tensor, generator: Any = None) -> tuple[int, int]:
                rho = plan(draft, target, tokens.shape[0])[0]
                p, q = draft.double()[tokens], target.double()[tokens]
                self._accept = (q / (rho * p)).clamp(max=1.0)
                return select(tokens, draft, target, generator)

            patch.setattr(_transport, "kseq_select", watched)
            yield


def draft_sets(law: Tensor, later: Tensor, drafts: int, length: int) -> Iterator[tuple[Tensor, float]]:
    """Every (K, L) set of independent drafts of a Markov chain, with its probability.

    Args:
        law: (V,) of the first token.
        later: (V, V) of the token behind each token.
    """
    vocab = law.shape[0]
    chains = []
    for path in product(range(vocab), repeat=length):
        share = float(law[path[0]])
        for a, b in pairwise(path):
            share *= float(later[a, b])
        chains.append((path, share))
    for chosen in product(chains, repeat=drafts):
        share = 1.0
        for _, s in chosen:
            share *= s
        yield torch.tensor([path for path, _ in chosen]), share
