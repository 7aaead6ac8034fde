"""Learn2PD: the filter, the oracle's replay, and the cut at the end of a text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tokenmill import corpora, models
from tokenmill.diffuse import Diffusion, DualCache, PrefixCache, Quota, Threshold
from tokenmill.diffuse._block_filter import split_rows
from tokenmill.diffuse._rule import Reveal
from tokenmill.diffuse.learn2pd import (
    BlockFilter,
    FilterConfig,
    FilterRows,
    Learn2PD,
    block_confidence,
    oracle_replay,
    train_filter,
)
from tokenmill.errors import LimitError

BLOCK, ROOM = 6, 12
MASK, EOT = 2, 1


@pytest.fixture(scope="module")
def mixed() -> tuple[Any, Any]:
    return models.load("diffusion-mixed")


def prompts(tokenizer: Any, count: int, split: str = "validation") -> tuple[list[Any], dict[str, Tensor]]:
    asked = corpora.exercises("mixed", split, count, seed=5)
    made = tokenizer([x.prompt for x in asked], padding=True, return_tensors="pt")
    return asked, {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"]}


def a_filter(block: int = BLOCK, bias: float | None = None, seed: int = 0) -> BlockFilter:
    torch.manual_seed(seed)
    made = BlockFilter(FilterConfig(block_length=block, hidden=8))
    if bias is not None:
        for p in made.parameters():
            p.data.zero_()
        last: Any = made.layers[-1]
        last.bias.data.fill_(bias)
    return made


class Stub(nn.Module):
    """A model without attention: logits (B, L, V) of a function of the ids (B, L)."""

    def __init__(self, logits: Callable[[Tensor], Tensor], words: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            vocab_size=words, mask_token_id=MASK, eos_token_id=EOT, pad_token_id=0, max_position_embeddings=None
        )
        self.of, self.weight = logits, nn.Parameter(torch.zeros(1))
        self.widths: list[int] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        self.widths.append(input_ids.shape[1])
        return SimpleNamespace(logits=self.of(input_ids))


def text_logits(target: Tensor, sure: Tensor, words: int) -> Callable[[Tensor], Tensor]:
    """Logits by place that always predict ``target`` (L,), with the given logit ``sure`` (L,)."""

    def of(ids: Tensor) -> Tensor:
        one = torch.nn.functional.one_hot(target, words) * sure[:, None]
        return one[: ids.shape[1]].float().expand(len(ids), -1, -1)

    return of


@pytest.mark.prop("learn2pd", 1)
@pytest.mark.parametrize(("threshold", "bias"), [(1.0, 30.0), (0.5, -torch.inf)])
@pytest.mark.parametrize("steps", [None, 6])
def test_a_filter_that_accepts_nothing_is_the_quota(mixed: Any, threshold: float, bias: float, steps: Any) -> None:
    model, tokenizer = mixed
    _, inputs = prompts(tokenizer, 6)
    ours = Diffusion(Learn2PD(a_filter(bias=bias), threshold=threshold), block_length=BLOCK, steps=steps)
    plain = Diffusion(Quota(None), block_length=BLOCK, steps=steps)
    found, wanted = (d.generate(model, **inputs, max_new_tokens=ROOM) for d in (ours, plain))
    assert torch.equal(found, wanted)
    assert ours.trace.row_calls == plain.trace.row_calls == [steps or ROOM] * 6


@pytest.mark.prop("learn2pd", 2)
def test_a_filter_that_accepts_all_takes_one_pass_a_block(mixed: Any) -> None:
    model, tokenizer = mixed
    _, inputs = prompts(tokenizer, 4)
    ours = Diffusion(Learn2PD(a_filter(bias=torch.inf)), block_length=BLOCK)
    at_once = Diffusion(Threshold(0.0), block_length=BLOCK)
    found, wanted = (d.generate(model, **inputs, max_new_tokens=ROOM) for d in (ours, at_once))
    assert ours.trace.row_calls == [2] * 4
    assert torch.equal(found, wanted)


@pytest.mark.prop("learn2pd", 3)
@pytest.mark.parametrize("block", [BLOCK, 5, ROOM])
def test_the_oracles_replay_gives_the_reference_in_fewer_passes(mixed: Any, block: int) -> None:
    model, tokenizer = mixed
    _, inputs = prompts(tokenizer, 24)
    replay = oracle_replay(model, **inputs, max_new_tokens=ROOM, block_length=block)
    assert torch.equal(replay.replayed, replay.reference)
    rows = replay.rows
    assert len(rows) == int(replay.passes.sum())
    for prompt in range(24):
        mine = rows.prompt == prompt
        assert int(mine.sum()) == int(replay.passes[prompt])
        for number in range(-(-ROOM // block)):
            steps = rows.step[mine & (rows.block == number)]
            assert sorted(steps.tolist()) == list(range(len(steps)))
            assert 1 <= len(steps) <= block + 1
    assert float(replay.passes.float().mean()) < ROOM / 2


def test_rows_of_the_replay_hold_confidences_and_labels_of_the_block(mixed: Any) -> None:
    model, tokenizer = mixed
    _, inputs = prompts(tokenizer, 8)
    replay = oracle_replay(model, **inputs, max_new_tokens=ROOM, block_length=5)
    rows, start = replay.rows, inputs["input_ids"].shape[1]
    first = (rows.step == 0) & (rows.block == 0)
    assert int(first.sum()) == 8
    ids = torch.cat([inputs["input_ids"], torch.full((8, ROOM), MASK)], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(8, ROOM, dtype=torch.long)], 1)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits
    logits[..., MASK] = -torch.inf
    p, drafts = logits[:, start : start + 5].softmax(-1).max(-1)
    order = rows.prompt[first].argsort()
    assert torch.allclose(rows.confidence[first][order], p, atol=1e-5)
    assert torch.equal(rows.label[first][order], drafts == replay.reference[:, start : start + 5])
    short = rows.block == 2  # two places of five
    assert not rows.confidence[short][:, 2:].any()
    assert not rows.label[short][:, 2:].any()
    later = rows.step > 0
    assert float(rows.confidence[later].mean()) > 0  # places that are revealed count as well


@dataclass(frozen=True)
class Oracle(Learn2PD):
    """Learn2PD with a filter that knows the text."""

    reference: Tensor | None = None

    def accepted(self, proposal: Any) -> Tensor:
        assert self.reference is not None
        return proposal.drafts == self.reference[proposal.canvas.row]

    def reveal(self, proposal: Any) -> Reveal:
        assert self.reference is not None
        found = super().reveal(proposal)
        stuck = ~found.places.logical_and(proposal.eligible).any(1, keepdim=True)
        tokens = torch.where(stuck, self.reference[proposal.canvas.row], proposal.drafts)
        return Reveal(found.places | stuck, tokens=tokens)


@pytest.mark.prop("learn2pd", 4)
def test_a_filter_that_knows_the_text_reproduces_it(mixed: Any) -> None:
    model, tokenizer = mixed
    _, inputs = prompts(tokenizer, 24)
    lengths = {**inputs, "max_new_tokens": ROOM}
    reference = Diffusion(Quota(1), block_length=BLOCK).generate(model, **lengths)
    free = Diffusion(Oracle(None, min_reveal=0, reference=reference), block_length=BLOCK)
    assert torch.equal(free.generate(model, **lengths), reference)
    forced = Diffusion(Oracle(None, reference=reference), block_length=BLOCK).generate(model, **lengths)
    # With the best place forced, a state may come up that the reference never saw.
    assert float((forced == reference).float().mean()) > 0.9


@pytest.mark.prop("learn2pd", 5)
def test_every_pass_reveals_something(mixed: Any) -> None:
    model, tokenizer = mixed
    _, inputs = prompts(tokenizer, 8)
    for seed in range(3):
        made = Diffusion(Learn2PD(a_filter(seed=seed), threshold=0.5), block_length=BLOCK)
        out = made.generate(model, **inputs, max_new_tokens=ROOM)
        assert made.trace.row_tokens == [ROOM] * 8
        assert all(2 <= calls <= ROOM for calls in made.trace.row_calls)
        assert not (out == MASK).any()


@pytest.mark.prop("learn2pd", 6)
def test_a_row_is_cut_behind_the_first_end_that_the_filter_accepts() -> None:
    ends = torch.tensor([9, 9, 9, 5, 6, EOT, EOT, 7, EOT, 8, 5, EOT, 7, 7, 7])  # prompt of 3, answer of 12
    model = Stub(text_logits(ends, torch.full((15,), 9.0), 12), 12)
    ids = torch.tensor([[9, 9, 9], [8, 8, 8]])
    made = Diffusion(Learn2PD(a_filter(bias=9.0), predict_eot=True), block_length=6, causal=True, history=True)
    out = made.generate(model, ids, max_new_tokens=12)
    assert out.tolist() == [[9, 9, 9, 5, 6, EOT], [8, 8, 8, 5, 6, EOT]]
    assert made.trace.lengths == [3, 3]
    assert torch.equal(out[:, :3], ids)
    assert made.trace.row_calls == [1, 1]


@pytest.mark.prop("learn2pd", 6)
def test_nothing_that_is_revealed_changes_and_no_mask_is_left(mixed: Any) -> None:
    model, tokenizer = mixed
    _, inputs = prompts(tokenizer, 8)
    rule = Learn2PD(a_filter(seed=1), threshold=0.5, predict_eot=True)
    made = Diffusion(rule, block_length=BLOCK, history=True)
    out = made.generate(model, **inputs, max_new_tokens=ROOM)
    start = inputs["input_ids"].shape[1]
    assert torch.equal(out[:, :start], inputs["input_ids"])
    assert not (out == MASK).any()
    for before, after in zip(made.trace.history, made.trace.history[1:], strict=False):
        for row, length in enumerate(made.trace.lengths):
            seen = before[row, :length] != MASK
            assert torch.equal(before[row, :length][seen], after[row, :length][seen])
    assert all(length <= ROOM for length in made.trace.lengths)


@pytest.mark.prop("learn2pd", 7)
def test_a_higher_threshold_accepts_a_subset(mixed: Any) -> None:
    made = a_filter(seed=3)
    confidence = torch.rand(50, BLOCK, generator=torch.Generator().manual_seed(0))
    low, middle, high = (made(confidence).sigmoid() > t for t in (0.45, 0.5, 0.55))
    assert not (high & ~middle).any()
    assert not (middle & ~low).any()
    assert 0 < int(high.sum()) < int(low.sum())


@pytest.mark.prop("learn2pd", 8)
def test_names_of_the_tokens_do_not_matter() -> None:
    words, generator = 16, torch.Generator().manual_seed(1)
    table = torch.randn(words, words, generator=generator) * 3
    order = torch.arange(words)
    order[3:] = order[3:][torch.randperm(words - 3, generator=generator)]  # pad, end and mask keep their ids
    names = order.argsort()  # the new name of an old id

    def neighbours(ids: Tensor, rows: Tensor) -> Tensor:
        return rows[ids] + rows[ids.roll(1, 1)] + rows[ids.roll(-1, 1)]

    plain = Stub(lambda ids: neighbours(ids, table), words)
    renamed = Stub(lambda ids: neighbours(ids, table[order][:, order]), words)
    ids = torch.tensor([[5, 9, 11], [4, 8, 3]])
    outs, calls = [], []
    for model, given in ((plain, ids), (renamed, names[ids])):
        made = Diffusion(Learn2PD(a_filter(seed=2), threshold=0.5), block_length=BLOCK, history=True)
        outs.append(made.generate(model, given, max_new_tokens=ROOM))
        calls.append(made.trace.revealed)
    assert torch.equal(names[outs[0]], outs[1])
    assert calls[0] == calls[1]


@pytest.mark.prop("learn2pd", 9)
@pytest.mark.parametrize("scope", ["any", "block"])
def test_cutting_the_tail_changes_no_text_when_the_tail_says_nothing(scope: Any) -> None:
    text = torch.tensor([9, 9, 5, 6, 7, 5, 8, EOT, *[EOT] * 8])  # answer of 14 with 5 tokens of text
    sure = torch.tensor([9.0, 9, 3, 2, 3, 1, 4, 5, *[6.0, 7, 8, 9, 9, 9, 9, 9]])
    outs, positions = [], []
    for eot in (False, True):
        model = Stub(text_logits(text, sure, 12), 12)
        rule = Learn2PD(a_filter(block=7, seed=4), threshold=0.5, predict_eot=eot, eot_scope=scope)
        made = Diffusion(rule, block_length=7, causal=True)
        outs.append(made.generate(model, torch.tensor([[9, 9]]), max_new_tokens=14)[0].tolist())
        positions.append(made.trace.positions)
    assert outs[0][: outs[0].index(EOT)] == outs[1][: outs[1].index(EOT)] == text[:7].tolist()
    assert positions[1] < positions[0]


def test_without_an_accepted_end_the_most_confident_one_cuts() -> None:
    text = torch.tensor([9, 9, 5, 6, EOT, 5, EOT, EOT, 8, EOT])
    sure = torch.tensor([9.0, 9, 3, 3, 2, 3, 4, 6, 9, 5])
    model = Stub(text_logits(text, sure, 12), 12)

    def first_cut(**settings: Any) -> int:
        made = Diffusion(Learn2PD(None, predict_eot=True, **settings), block_length=4, causal=True, history=True)
        made.generate(model, torch.tensor([[9, 9]]), max_new_tokens=8)
        return int((made.trace.history[0][0] != 0).sum())  # padding stands behind a cut

    assert first_cut() == 6  # place 7 is the surest end; it is kept
    assert first_cut(eot_scope="block") == 3
    assert first_cut(eot_min_confidence=0.999) == 8


def test_rows_are_cut_each_at_its_own_place(mixed: Any) -> None:
    model, tokenizer = mixed
    asked, inputs = prompts(tokenizer, 40)
    replay = oracle_replay(model, **inputs, max_new_tokens=ROOM, block_length=ROOM)
    made, _ = train_filter(replay.rows, FilterConfig(block_length=ROOM, hidden=12), iterations=300)
    decoder = Diffusion(Learn2PD(made, threshold=0.8, predict_eot=True, eot_min_confidence=0.95), block_length=ROOM)
    out = decoder.generate(model, **inputs, max_new_tokens=ROOM)
    start, lengths = inputs["input_ids"].shape[1], decoder.trace.lengths
    answers = [corpora.answer_text(tokenizer, row) for row in out[:, start:].tolist()]
    right = [x.check(text) for x, text in zip(asked, answers, strict=True) if x.kind != "permutation"]
    assert sum(right) >= 0.9 * len(right)
    assert len(set(lengths)) > 2
    for row, length in enumerate(lengths):
        assert (out[row, start + length :] == 0).all()
        assert length == ROOM or out[row, start + length - 1] == EOT


@pytest.mark.prop("learn2pd", 10)
@pytest.mark.parametrize("cache", [PrefixCache(refresh=1), DualCache(refresh=1)])
def test_a_cache_that_is_refreshed_in_each_pass_changes_nothing(mixed: Any, cache: Any) -> None:
    model, tokenizer = mixed
    _, inputs = prompts(tokenizer, 6)
    rule = Learn2PD(a_filter(seed=1), threshold=0.5, predict_eot=True)
    outs = [
        Diffusion(rule, c, block_length=BLOCK).generate(model, **inputs, max_new_tokens=ROOM) for c in (None, cache)
    ]
    assert torch.equal(*outs)


def test_with_caches_that_keep_rows_the_answers_stay_whole(mixed: Any) -> None:
    model, tokenizer = mixed
    _, inputs = prompts(tokenizer, 12)
    for cache in (PrefixCache(), DualCache()):
        made = Diffusion(Learn2PD(a_filter(seed=1), threshold=0.5, predict_eot=True), cache, block_length=BLOCK)
        out = made.generate(model, **inputs, max_new_tokens=ROOM)
        assert not (out == MASK).any()


@pytest.mark.prop("learn2pd", 11)
def test_a_saved_filter_is_the_same_and_fits_its_own_blocks_only(mixed: Any, tmp_path: Path) -> None:
    model, tokenizer = mixed
    made = a_filter(seed=5)
    made.save(tmp_path / "f")
    rule = Learn2PD.load(tmp_path / "f", threshold=0.5)
    x = torch.rand(9, BLOCK, generator=torch.Generator().manual_seed(0))
    again = rule.filter
    assert isinstance(again, BlockFilter)
    assert torch.equal(again(x), made(x))
    assert again.config == made.config
    _, inputs = prompts(tokenizer, 2)
    with pytest.raises(LimitError, match=r"block_length = 4, .* 6, the filter's"):
        Diffusion(rule, block_length=4).generate(model, **inputs, max_new_tokens=ROOM)
    with pytest.raises(LimitError, match="saved filter"):
        Learn2PD.load(tmp_path / "nothing")


def test_the_papers_filter_has_2112_weights() -> None:
    assert sum(p.numel() for p in BlockFilter().parameters()) == 2112
    depths = [BlockFilter(FilterConfig(block_length=4, hidden=3, depth=d)) for d in (1, 2, 3)]
    assert [sum(p.numel() for p in f.parameters()) for f in depths] == [20, 31, 43]


def test_a_short_block_is_filled_with_zeros() -> None:
    made = a_filter(seed=6)
    x = torch.rand(3, 4)
    assert torch.equal(made(x), made(torch.nn.functional.pad(x, (0, 2)))[:, :4])
    with pytest.raises(LimitError, match="block length"):
        made(torch.rand(1, BLOCK + 1))


def test_training_learns_a_rule_that_depends_on_the_place() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2_000, 4, generator=generator)
    label = x > torch.tensor([0.9, 0.1, 0.5, 0.5])
    label[:, 3] &= x[:, 0] > 0.5  # the last place depends on the first
    prompt = torch.arange(2_000) // 10
    rows = FilterRows(x, label, prompt, torch.zeros_like(prompt), torch.zeros_like(prompt))
    losses: list[float] = []
    made, report = train_filter(
        rows,
        FilterConfig(block_length=4, hidden=16),
        iterations=400,
        rate=2e-2,
        on_step=lambda _, loss: losses.append(loss),
    )
    right = ((made(x) > 0) == label).float().mean(0)
    assert (right > 0.93).all()
    assert losses[0] == report.first_loss
    assert losses[-1] == report.last_loss < 0.25 < report.first_loss
    assert report.rows == 1_600
    assert 0 <= report.wrong_accepted < 0.05
    assert 0.2 < report.accepted < 0.8
    assert report.test_loss < 0.3
    assert report.validation_loss < 0.3


def test_a_prompt_is_on_one_side_of_the_split() -> None:
    prompt = torch.arange(100).repeat(3)
    rows = FilterRows(torch.rand(300, 2), torch.rand(300, 2) > 0.5, prompt, prompt, prompt)
    sides = [set(prompt[index].tolist()) for index in split_rows(rows, seed=0)]
    assert [len(side) for side in sides] == [80, 10, 10]
    assert set.union(*sides) == set(range(100))
    both = FilterRows.together([rows, rows])
    assert len(both) == 600
    assert len(both.prompt.unique()) == 200


def test_what_cannot_be_trained_is_refused_or_told() -> None:
    one = torch.zeros(4, dtype=torch.long)
    rows = FilterRows(torch.rand(4, 3), torch.ones(4, 3, dtype=torch.bool), one, one, one)
    empty = FilterRows(*(getattr(rows, n)[:0] for n in ("confidence", "label", "prompt", "block", "step")))
    with pytest.raises(LimitError, match="rows = 0"):
        train_filter(empty, FilterConfig(block_length=3))
    with pytest.raises(LimitError, match="block_length = 5"):
        train_filter(rows, FilterConfig(block_length=5))
    with pytest.warns(UserWarning, match="all labels are equal"):
        train_filter(rows, FilterConfig(block_length=3), iterations=1)


def test_bad_settings_are_refused(mixed: Any) -> None:
    model, tokenizer = mixed
    _, inputs = prompts(tokenizer, 1)
    wrong: tuple[dict[str, Any], ...] = (
        {"threshold": -1.0},
        {"threshold": float("nan")},
        {"eot_min_confidence": 2.0},
        {"eot_scope": "text"},
        {"min_reveal": -1},
    )
    for settings in wrong:
        with pytest.raises(LimitError, match=next(iter(settings))):
            Learn2PD(None, **settings)
    with pytest.raises(LimitError, match="temperature"):
        oracle_replay(model, **inputs, max_new_tokens=4, block_length=4, temperature=0.5)
    with pytest.raises(LimitError, match="eot_id"):
        Diffusion(Learn2PD(None, predict_eot=True), eot_id=()).generate(model, **inputs, max_new_tokens=4)


def test_confidences_of_a_block_are_read_row_by_row() -> None:
    start = torch.tensor([2, 5])
    canvas: Any = SimpleNamespace(
        x=torch.zeros(2, 7),
        prompt=2,
        size=7,
        block_length=3,
        start=start,
        stop=torch.tensor([5, 7]),
        confidence=torch.arange(14.0).view(2, 7),
    )
    places, found = block_confidence(canvas)
    assert places.tolist() == [[2, 3, 4], [5, 6, 7]]
    assert found.tolist() == [[2, 3, 4], [12, 13, 0]]
