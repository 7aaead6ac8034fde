from __future__ import annotations

import warnings
from collections import Counter
from itertools import product
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tests.decode.chance import Law, chi_square, joint_law, next_laws, remember_plans
from tests.decode.conftest import Zoo
from tests.decode.test_token_recycling import KINDS, StopsAt, generate, prompt
from tokenmill.decode import _transport
from tokenmill.decode.spectr import SpecTr, draft_trie, spectr_verify
from tokenmill.models import tiny

Layout = Literal["tree", "batch"]
VOCAB, DRAWS, IDS = 4, 20_000, torch.tensor([[1, 3, 2, 2]])


def pair(dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    """Target and drafter over four tokens."""
    return (tiny("llama", seed=s, vocab=VOCAB, layers=1, dtype=dtype) for s in (5, 6))  # pyright: ignore


def laws_of(model: Any, tokens: int) -> list[Tensor]:
    """For each depth the laws (V ** depth, V) behind the prompt and every path of that length."""
    heads = [torch.tensor(list(product(range(VOCAB), repeat=d))).view(VOCAB**d, d).long() for d in range(tokens)]
    return [next_laws(model, torch.cat([IDS.expand(h.shape[0], -1), h], dim=1)) for h in heads]


def index_of(paths: Tensor) -> Tensor:
    """(K, d) token paths to rows of `laws_of`."""
    return (paths * VOCAB ** torch.arange(paths.shape[1] - 1, -1, -1)).sum(1)


def sampled_counts(drafts: int, draws: int) -> dict[tuple[int, ...], int]:
    """Counts of three-token samples: drafts of two tokens from the drafter, `spectr_verify` on the target's laws."""
    target, drafter = (laws_of(model, 3) for model in pair())
    generator, counts = torch.Generator().manual_seed(7), Counter()
    first = torch.multinomial(drafter[0][0], draws * drafts, replacement=True, generator=generator)
    second = torch.multinomial(drafter[1][first], 1, generator=generator)[:, 0]
    for ids in torch.stack([first, second], dim=1).view(draws, drafts, 2):
        rows = [index_of(ids[:, :d]) for d in range(3)]
        draft_probs = torch.stack([drafter[d][rows[d]] for d in range(2)], dim=1)
        target_probs = torch.stack([target[d][rows[d]] for d in range(3)], dim=1)
        out = spectr_verify(ids, draft_probs, target_probs, generator)[0].tolist()
        while len(out) < 3:  # a corrected token ends the block; plain draws stand for the next one
            law = target[len(out)][index_of(torch.tensor([out]))][0]
            out.append(int(torch.multinomial(law, 1, generator=generator)))
        counts[tuple(out)] += 1
    return dict(counts)


@pytest.fixture(scope="module")
def three_tokens() -> Law:
    return joint_law(next(iter(pair())), IDS, 3)


@pytest.mark.prop("spectr", 10)
@pytest.mark.parametrize("drafts", [1, 4])
def test_samples_follow_the_target(three_tokens: Law, drafts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    remember_plans(monkeypatch)
    counts = sampled_counts(drafts, DRAWS)
    assert sum(counts.values()) == DRAWS
    assert chi_square(counts, three_tokens) > 1e-3


@pytest.mark.prop("spectr", 10)
def test_a_factor_of_one_with_four_drafts_fails_the_same_test(
    three_tokens: Law, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: a quarter of the samples is enough to notice a wrong factor."""
    monkeypatch.setattr(_transport, "solve_rho", lambda p, q, k: torch.ones(p.shape[:-1], dtype=torch.float64))
    remember_plans(monkeypatch)
    assert chi_square(sampled_counts(4, DRAWS // 4), three_tokens) < 1e-6


@pytest.mark.prop("spectr", 10)
@pytest.mark.parametrize("layout", ["tree", "batch"])
def test_samples_of_generate_follow_the_target(
    three_tokens: Law, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """End to end: drafts, forwards and caches of both models in float64."""
    remember_plans(monkeypatch)
    target, drafter = pair()
    decoder = SpecTr(drafter, num_drafts=3, draft_len=2, layout=layout)
    config = target.generation_config
    config.do_sample, config.top_k, config.max_new_tokens = True, 0, 3
    counts: Counter[tuple[int, ...]] = Counter()
    generator = torch.Generator().manual_seed(2)
    for _ in range(300):
        made = target.generate(IDS, custom_generate=decoder, generator=generator)
        counts[tuple(made[0, 4:].tolist())] += 1
    assert chi_square(dict(counts), three_tokens) > 1e-3


@pytest.mark.prop("spectr", 10)
@pytest.mark.parametrize("warped", ["top_k", "top_p and temperature", "repetition_penalty"])
def test_warpers_shape_both_laws(warped: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Laws with zeros, and laws that depend on the draft before them."""
    remember_plans(monkeypatch)
    chosen: dict[str, tuple[LogitsProcessorList, dict[str, Any]]] = {
        "top_k": (LogitsProcessorList([TopKLogitsWarper(2)]), {"top_k": 2}),
        "top_p and temperature": (
            LogitsProcessorList([TemperatureLogitsWarper(1.4), TopPLogitsWarper(0.8)]),
            {"temperature": 1.4, "top_p": 0.8, "top_k": 0},
        ),
        "repetition_penalty": (
            LogitsProcessorList([RepetitionPenaltyLogitsProcessor(2.5)]),
            {"repetition_penalty": 2.5, "top_k": 0},
        ),
    }
    processors, settings = chosen[warped]
    target, drafter = pair()
    law = joint_law(target, IDS[:, :2], 3, processors)
    decoder = SpecTr(drafter, num_drafts=3, draft_len=2)
    for name, value in {"do_sample": True, "max_new_tokens": 3, **settings}.items():
        setattr(target.generation_config, name, value)
    counts: Counter[tuple[int, ...]] = Counter()
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        made = target.generate(IDS[:, :2], custom_generate=decoder, generator=generator)
        counts[tuple(made[0, 2:].tolist())] += 1
    assert chi_square(dict(counts), law) > 1e-3


@pytest.mark.prop("spectr", 11)
@pytest.mark.parametrize("layout", ["tree", "batch"])
@pytest.mark.parametrize("drafts", [1, 4])
def test_a_drafter_that_is_the_target_is_always_accepted(zoo: Zoo, layout: Layout, drafts: int) -> None:
    """Also behind processors: both laws are shaped alike."""
    shaped = {"temperature": 0.6, "top_k": 5, "repetition_penalty": 1.5}
    for kind in KINDS:
        model = zoo(kind, "sdpa")
        decoder = SpecTr(model, num_drafts=drafts, draft_len=4, layout=layout, seed=3)
        generate(model, prompt(20), decoder, do_sample=True, max_new_tokens=16, **shaped)
        assert decoder.trace.steps == [5, 5, 5]
        assert decoder.trace.mean_accepted == 5.0


@pytest.mark.prop("spectr", 12)
@pytest.mark.parametrize("layout", ["tree", "batch"])
@pytest.mark.parametrize("kind", KINDS)
def test_without_sampling_the_output_is_plain_greedy_output(zoo: Zoo, kind: str, layout: Layout) -> None:
    model = zoo(kind, "sdpa")
    for drafter in (tiny(kind, seed=9), model):
        for length in (1, 5, 16, 40):
            ids = prompt(length, seed=length)
            decoder = SpecTr(drafter, num_drafts=1, draft_len=5, layout=layout)
            assert torch.equal(generate(model, ids, decoder), generate(model, ids))
            assert decoder.trace.accepted > 0 or drafter is not model


@pytest.mark.prop("spectr", 12)
def test_an_almost_zero_temperature_gives_greedy_output(zoo: Zoo) -> None:
    model, ids = zoo("llama", "sdpa"), prompt(10)
    decoder = SpecTr(zoo("qwen2", "sdpa"), num_drafts=3, draft_len=3, seed=0)
    made = generate(model, ids, decoder, do_sample=True, temperature=1e-4)
    assert torch.equal(made, generate(model, ids))


def test_many_drafts_without_sampling_earn_a_warning(zoo: Zoo) -> None:
    model, ids = zoo("llama", "sdpa"), prompt(5)
    with pytest.warns(UserWarning, match="all drafts are the same"):
        made = generate(model, ids, SpecTr(zoo("qwen2", "sdpa"), num_drafts=2, draft_len=2))
    assert torch.equal(made, generate(model, ids))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        generate(model, ids, SpecTr(zoo("qwen2", "sdpa"), num_drafts=1, draft_len=2))
        generate(model, ids, SpecTr(zoo("qwen2", "sdpa"), num_drafts=2, draft_len=2), do_sample=True)


@pytest.mark.prop("spectr", 13)
@pytest.mark.prop("spectr", 14)
@pytest.mark.parametrize("kind", KINDS)
def test_layouts_and_repeated_runs_agree_under_one_seed(kind: str) -> None:
    model, drafter = tiny(kind, seed=3, dtype=torch.float64), tiny(kind, seed=4, dtype=torch.float64)
    settings: tuple[tuple[Layout, int], ...] = (("tree", 1), ("tree", 1), ("batch", 1), ("tree", 2))
    for length in (4, 40):
        for padded in (False, True):
            ids = prompt(length)
            mask = torch.ones_like(ids)
            if padded:
                ids, mask = (torch.cat([torch.zeros(1, 3, dtype=torch.long), x], dim=1) for x in (ids, mask))
            runs = [
                generate(
                    model,
                    ids,
                    SpecTr(drafter, num_drafts=3, draft_len=3, layout=layout, seed=seed),
                    do_sample=True,
                    attention_mask=mask,
                ).tolist()
                for layout, seed in settings
            ]
            assert runs[0] == runs[1] == runs[2]
            assert runs[0] != runs[3]


@pytest.mark.prop("spectr", 14)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_both_layouts_see_the_laws_of_plain_decoding(zoo: Zoo, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What verification is given equals a plain forward over prompt and draft."""
    from tokenmill.decode import spectr

    model, drafter, ids = zoo(kind, "sdpa"), tiny(kind, seed=4), prompt(18)
    seen: list[tuple[Tensor, Any, Any]] = []
    real = spectr.verify_drafts

    def watch(drafts: Tensor, draft_law: Any, target_law: Any, **kw: Any) -> Any:
        seen.append((drafts, draft_law, target_law))
        return real(drafts, draft_law, target_law, **kw)

    monkeypatch.setattr(spectr, "verify_drafts", watch)
    layouts: tuple[Layout, ...] = ("tree", "batch")
    for layout in layouts:
        seen.clear()
        decoder = SpecTr(drafter, num_drafts=3, draft_len=3, layout=layout, seed=1)
        made = generate(model, ids, decoder, do_sample=True, top_k=0, max_new_tokens=8)
        at = ids.shape[1] + 1
        for (drafts, draft_law, target_law), step in zip(seen, decoder.trace.steps, strict=False):
            for j, i in product(range(drafts.shape[0]), range(drafts.shape[1] + 1)):
                text = torch.cat([made[:, :at], drafts[j : j + 1, :i]], dim=1)
                assert torch.allclose(target_law(j, i), next_laws(model, text)[0], atol=1e-4)
                if i < drafts.shape[1]:
                    assert torch.allclose(draft_law(j, i), next_laws(drafter, text)[0], atol=1e-4)
            at += step
        assert len(seen) > 1


def test_a_trie_merges_equal_prefixes_and_keeps_every_draft() -> None:
    drafts = torch.tensor([[4, 5, 6], [4, 5, 7], [4, 5, 6], [8, 5, 6]])
    tokens, tree, node_of = draft_trie(torch.tensor([9]), drafts)
    assert len(tree) == 1 + 2 + 2 + 3
    for j in range(4):
        assert tokens[node_of[j]].tolist() == [9, *drafts[j].tolist()]
        for i in range(1, 4):
            assert tree.parent[node_of[j, i]] == node_of[j, i - 1]
    assert node_of[0].tolist() == node_of[2].tolist()


def test_the_tree_scores_equal_prefixes_once(zoo: Zoo) -> None:
    model, ids = zoo("llama", "sdpa"), prompt(10)
    positions = {}
    for layout in ("tree", "batch"):
        decoder = SpecTr(zoo("qwen2", "sdpa"), num_drafts=6, draft_len=3, layout=layout, seed=0)
        generate(model, ids, decoder, do_sample=True, temperature=0.3)
        positions[layout] = decoder.trace.positions / len(decoder.trace.steps)
        assert decoder.trace.draft_calls > 0
    assert positions["tree"] < positions["batch"]


def test_more_drafts_accept_more(zoo: Zoo) -> None:
    model = zoo("llama", "sdpa")
    drafter = tiny("llama", seed=3)
    with torch.no_grad():  # a drafter that is nearly the target
        for weight in drafter.parameters():
            weight.add_(0.03 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    rates = []
    for drafts in (1, 4):
        steps = []
        for seed in range(6):
            decoder = SpecTr(drafter, num_drafts=drafts, draft_len=3, seed=seed)
            generate(model, prompt(6, seed), decoder, do_sample=True, top_k=0, max_new_tokens=30)
            steps += decoder.trace.steps
        rates.append(sum(steps) / len(steps))
    assert rates[1] > rates[0] > 1.0


def test_an_end_token_inside_a_draft_stops_there(zoo: Zoo) -> None:
    model, ids = zoo("llama", "sdpa"), prompt(6)
    for layout in ("tree", "batch"):
        free = SpecTr(model, num_drafts=3, draft_len=5, layout=layout, seed=4)
        whole = generate(model, ids, free, do_sample=True, max_new_tokens=14)[0].tolist()
        for at in range(6, 20):
            # With the target as its own drafter every round is accepted, so the same coins come up until the end.
            decoder = SpecTr(model, num_drafts=3, draft_len=5, layout=layout, seed=4)
            end = {"eos_token_id": whole[at], "pad_token_id": 0}
            made = generate(model, ids, decoder, do_sample=True, max_new_tokens=14, **end)[0].tolist()
            assert made == whole[: whole.index(whole[at], 6) + 1]
            assert decoder.trace.tokens_so_far == made[6:]


def test_lengths_and_the_callers_criterion_stop_exactly(zoo: Zoo) -> None:
    model, ids = zoo("llama", "sdpa"), prompt(6)
    for n in (1, 2, 3, 5, 6, 7, 11):
        decoder = SpecTr(model, num_drafts=2, draft_len=4, seed=0)
        assert generate(model, ids, decoder, do_sample=True, max_new_tokens=n).shape[1] == 6 + n
    whole = generate(model, ids, SpecTr(model, num_drafts=2, draft_len=4, seed=0), do_sample=True)[0].tolist()
    criterion = StopsAt(whole[10:12])
    made = generate(
        model,
        ids,
        SpecTr(model, num_drafts=2, draft_len=4, seed=0),
        do_sample=True,
        stopping_criteria=[criterion],
    )
    assert made[0].tolist() == whole[:12]
    assert criterion.lengths == list(range(7, 13))


def test_the_default_top_k_leaves_zeros_in_both_laws(zoo: Zoo) -> None:
    """`generate` adds top-k 50 when it samples; 64 tokens, so 14 of them never come."""
    model, drafter = zoo("llama", "sdpa"), zoo("qwen2", "sdpa")
    for seed in range(4):
        ids = prompt(8, seed)
        decoder = SpecTr(drafter, num_drafts=4, draft_len=3, seed=seed)
        made = generate(model, ids, decoder, do_sample=True, temperature=3.0, max_new_tokens=30)
        with torch.no_grad():
            logits = model(input_ids=made).logits[0, 7:-1]
        allowed = logits.topk(50).indices
        assert all(t in row for t, row in zip(made[0, 8:].tolist(), allowed.tolist(), strict=True))


def test_padded_vocabularies_share_their_common_tokens() -> None:
    """A drafter with more rows than the tokenizer has never proposes one of the padding."""
    target: Any = tiny("llama", seed=1, vocab=20)
    drafter: Any = tiny("llama", seed=2, vocab=28)
    with torch.no_grad():  # the padding would be drafted all the time
        drafter.get_output_embeddings().weight[20:] *= 40
    ids = torch.randint(0, 20, (1, 6), generator=torch.Generator().manual_seed(0))
    decoder = SpecTr(drafter, num_drafts=3, draft_len=3, vocab_size=20, seed=0)
    made = generate(target, ids, decoder, do_sample=True, max_new_tokens=20)
    assert int(made.max()) < 20
    single = SpecTr(drafter, num_drafts=1, draft_len=3, vocab_size=20)
    assert torch.equal(generate(target, ids, single), generate(target, ids))


def test_tokens_that_the_drafter_lacks_cost_no_exactness() -> None:
    target, drafter = tiny("llama", seed=2, vocab=28), tiny("llama", seed=1, vocab=20)
    ids = torch.randint(20, 28, (1, 6), generator=torch.Generator().manual_seed(0))
    plain = generate(target, ids, max_new_tokens=40)
    assert int(plain[0, 6:].max()) >= 20
    decoder = SpecTr(drafter, num_drafts=1, draft_len=3, vocab_size=20)
    assert torch.equal(generate(target, ids, decoder, max_new_tokens=40), plain)


def test_beyond_the_drafters_positions_decoding_goes_on_alone(zoo: Zoo) -> None:
    model, drafter = zoo("llama", "sdpa"), tiny("qwen2", seed=2)
    drafter.config.max_position_embeddings = 12
    seen: list[int] = []
    drafter.register_forward_hook(lambda m, a, out: seen.append(out.past_key_values.get_seq_length()))
    ids = prompt(8)
    decoder = SpecTr(drafter, num_drafts=1, draft_len=4)
    assert torch.equal(generate(model, ids, decoder), generate(model, ids))
    assert max(seen) == 12
    assert decoder.trace.steps[-1] == 1


def test_the_drafter_reads_each_committed_token_once(zoo: Zoo) -> None:
    """Behind a full accept it reads two tokens that it has not seen, behind a correction one."""
    target, drafter, ids = zoo("llama", "sdpa"), tiny("llama", seed=3), prompt(9)  # the same model twice
    widths: list[tuple[int, ...]] = []
    drafter.register_forward_pre_hook(
        lambda module, args, named: widths.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    decoder = SpecTr(drafter, num_drafts=2, draft_len=3, seed=0)
    generate(target, ids, decoder, do_sample=True, max_new_tokens=13)
    assert decoder.trace.steps == [4, 4, 4]
    assert widths == [(1, 10), (2, 1), (2, 1), (1, 2), (2, 1), (2, 1), (1, 2), (2, 1), (2, 1)]
    assert decoder.trace.draft_calls == len(widths)
