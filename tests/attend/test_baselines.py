from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tokenmill import attend, hf
from tokenmill.attend import _session
from tokenmill.attend._baselines import Pages, page_bound
from tokenmill.attend._gather import window_scores
from tokenmill.errors import LimitError, UnsupportedError

from .methods import IDS, KINDS, PADDING, model, run, steps


class Twin(attend.SparseAttention):
    """Runs a method and compares each answer with masked dense attention: ``allowed(reading, row, head, query)``."""

    def __init__(self, method: attend.SparseAttention, allowed: Any) -> None:
        self.method, self.allowed, self.compared = method, allowed, 0

    def read(self, reading: _session.Reading) -> Any:
        out, weights = self.method.read(reading)
        mask = hf.visible(reading.mask, reading.query, reading.key)
        mask = mask.expand(*reading.query.shape[:2], -1, -1).clone()
        for row in range(mask.shape[0]):
            for head in range(mask.shape[1]):
                for query in range(mask.shape[2]):
                    visible = mask[row, head, query].nonzero()[:, 0].tolist()
                    keep = self.allowed(reading, row, head, query, visible)
                    mask[row, head, query] = False
                    mask[row, head, query, keep] = True
        want = attend.sparse_attend(reading.query, reading.key, reading.value, scaling=reading.scaling, seen=mask)
        real = mask.any(-1).any(1)
        torch.testing.assert_close(out[real], want.transpose(1, 2)[real], atol=1e-5, rtol=1e-5)
        self.compared += 1
        return out, weights


def scores(reading: Any, row: int, head: int, query: int) -> Tensor:
    group = reading.query.shape[1] // reading.key.shape[1]
    return reading.key[row, head // group] @ reading.query[row, head, query]


@pytest.mark.parametrize("kind", KINDS)
def test_the_oracle_reads_the_highest_scores(kind: str) -> None:
    def best(reading: Any, row: int, head: int, query: int, visible: list[int]) -> list[int]:
        score = scores(reading, row, head, query)
        return sorted(visible, key=lambda s: (-float(score[s]), s))[:6]

    twin = Twin(attend.OracleTopK(keep=6), best)
    tiny = model(kind, layers=1)
    with twin.attach(tiny):
        steps(tiny, IDS, PADDING, 34)
    assert twin.compared == 7


@pytest.mark.parametrize("kind", KINDS)
def test_streaming_reads_sinks_and_window(kind: str) -> None:
    def near(_reading: Any, _row: int, _head: int, _query: int, visible: list[int]) -> list[int]:
        return visible if len(visible) <= 9 else visible[:2] + visible[-7:]

    twin = Twin(attend.StreamingLLM(keep=9, n_sink=2, positions="original"), near)
    tiny = model(kind, layers=1)
    with twin.attach(tiny):
        steps(tiny, IDS, PADDING, 34)
    assert twin.compared == 7


@pytest.mark.parametrize("kind", KINDS)
def test_streaming_numbers_what_it_reads(kind: str) -> None:
    """The twin is fed the sinks and the window as a text of its own: in one layer that is the same attention."""
    tiny = model(kind, layers=1)
    with attend.StreamingLLM(keep=9, n_sink=2).attach(tiny):
        whole, later = run(tiny, IDS, PADDING).logits, steps(tiny, IDS, PADDING, 30)
    torch.testing.assert_close(whole[:, 30:], later, atol=1e-4, rtol=1e-4)
    for row, first in ((0, 9), (1, 0)):
        for at in (first + 3, first + 8, first + 9, 25, 39):
            text = IDS[row : row + 1, first : at + 1]
            text = text if text.shape[1] <= 9 else torch.cat([text[:, :2], text[:, -7:]], 1)
            want = run(tiny, text).logits[0, -1]
            torch.testing.assert_close(whole[row, at], want, atol=1e-4, rtol=1e-4)


def test_streaming_has_room_for_its_sinks() -> None:
    with pytest.raises(LimitError, match=r"keep = 4.*above n_sink = 4"):
        attend.StreamingLLM(keep=4)
    tiny = model("llama")
    with attend.StreamingLLM(keep=0.1, n_sink=8).attach(tiny), pytest.raises(LimitError, match=r"keep = 0\.1"):
        run(tiny, IDS)


@pytest.mark.parametrize("kind", KINDS)
def test_snapkv_reads_what_the_prompts_end_looked_at(kind: str) -> None:
    tiny, chosen = model(kind, layers=1), {}
    prompt, keep, window, pool = 34, 11, 4, 3

    def kept(reading: Any, row: int, head: int, query: int, visible: list[int]) -> list[int]:
        group = reading.query.shape[1] // reading.key.shape[1]
        if reading.queries > 1:
            if query == reading.queries - 1 and head % group == 0:
                total = torch.zeros(prompt)
                for other in range(head, head + group):
                    for q in range(prompt - window, prompt):
                        seen = [s for s in visible if s <= q]
                        score = scores(reading, row, other, q) * reading.scaling
                        total[seen] += score[seen].softmax(0) / window / group
                pooled = [sum(float(total[s + o]) for o in (-1, 0, 1) if 0 <= s + o < prompt) for s in range(prompt)]
                prefix = visible[:-window]
                best = sorted(prefix, key=lambda s: (-pooled[s], s))[: keep - window]
                chosen[row, head // group] = sorted(best) + visible[-window:]
            return visible
        return chosen[row, head // group] + [s for s in visible if s >= prompt]

    twin = Twin(attend.SnapKV(keep=keep, window=window, pool=pool), kept)
    with twin.attach(tiny) as trace:
        steps(tiny, IDS, PADDING, prompt)
    assert twin.compared == 7
    assert trace.sparse_calls == 6


def test_window_scores_are_means_of_rows_of_the_attention_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 4, 12, 8, generator=generator), torch.randn(2, 2, 12, 8, generator=generator)
    causal = torch.ones(12, 12, dtype=torch.bool).tril()
    logits = (query @ key.repeat_interleave(2, 1).mT * 0.3).masked_fill(~causal, -torch.inf)
    want = logits.softmax(-1)[:, :, 8:].mean(2)
    found = window_scores(query[:, :, 8:], key, causal[None, None, 8:], scaling=0.3)
    torch.testing.assert_close(found, want, atol=1e-6, rtol=1e-6)


def test_no_key_of_a_page_is_above_its_bound() -> None:
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        query, key = torch.randn(2, 4, 8, generator=generator), torch.randn(2, 2, 37, 8, generator=generator)
        valid = torch.arange(37).expand(2, -1) >= torch.tensor([0, 11])[:, None]
        low, high, real = Pages(5).update(key, valid)
        bound = page_bound(query, low, high)  # (B, H, P)
        score = torch.einsum("bhd,bhsd->bhs", query, key.repeat_interleave(2, 1))
        for slot in range(37):
            inside = valid[:, slot]
            assert (score[inside, :, slot] <= bound[inside, :, slot // 5] + 1e-5).all()
            assert real[inside, slot // 5].all()


@pytest.mark.parametrize("newest", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_quest_reads_the_pages_with_the_highest_bounds(kind: str, newest: bool) -> None:
    def paged(reading: Any, row: int, head: int, query: int, visible: list[int]) -> list[int]:
        if reading.queries > 1:
            return visible
        group = reading.query.shape[1] // reading.key.shape[1]
        q = reading.query[row, head, 0]
        bounds = {}
        for page in {s // 4 for s in visible}:
            rows = reading.key[row, head // group, [s for s in visible if s // 4 == page]]
            bounds[page] = float(torch.maximum(q * rows.amin(0), q * rows.amax(0)).sum())
        if newest:
            bounds[(reading.size - 1) // 4] = torch.inf
        best = sorted(bounds, key=lambda p: (-bounds[p], p))[:3]
        return [s for s in visible if s // 4 in best]

    twin = Twin(attend.Quest(keep=13, page=4, min_pages=2, newest=newest, dense_layers=0), paged)
    tiny = model(kind, layers=1)
    with twin.attach(tiny) as trace:
        steps(tiny, IDS, PADDING, 30)
    assert trace.sparse_calls == 10


def test_quest_leaves_the_first_layers_alone() -> None:
    tiny = model("gemma3")  # full layers are 2 and 5
    with attend.Quest(keep=8, page=4, min_pages=2, dense_layers=3).attach(tiny) as trace:
        steps(tiny, IDS, PADDING, 39)
    assert (trace.sparse_calls, trace.dense_calls) == (1, 3)


def test_heads_that_choose_apart_cannot_have_learned_sinks() -> None:
    tiny = model("llama")
    for layer in hf.attention_layers(tiny):
        layer.sinks = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(UnsupportedError, match="learned sinks"), attend.OracleTopK().attach(tiny):
        pytest.fail("it was attached")


@pytest.mark.parametrize(
    ("make", "settings", "says"),
    [
        (attend.OracleTopK, {"keep": 0}, "keep = 0"),
        (attend.StreamingLLM, {"n_sink": -1}, "n_sink = -1"),
        (attend.StreamingLLM, {"positions": "no"}, "positions"),
        (attend.SnapKV, {"window": 0}, "window = 0"),
        (attend.SnapKV, {"keep": 32}, "keep = 32.*above window = 32"),
        (attend.SnapKV, {"pool": 2}, "pool = 2.*odd"),
        (attend.Quest, {"page": 0}, "page = 0"),
        (attend.Quest, {"min_pages": True}, "min_pages = True"),
        (attend.Quest, {"dense_layers": -1}, "dense_layers = -1"),
    ],
)
def test_bad_settings(make: Any, settings: Any, says: str) -> None:
    with pytest.raises(LimitError, match=says):
        make(**settings)
