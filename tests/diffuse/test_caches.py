from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.diffuse import toys
from tokenmill import models
from tokenmill.diffuse import (
    DelayedCache,
    Diffusion,
    DualCache,
    Entropy,
    EntropyBound,
    Factor,
    FreeCache,
    Margin,
    NoCache,
    PrefixCache,
    Quota,
    RandomReveal,
    Threshold,
    WindowCache,
)
from tokenmill.errors import LimitError

NEW = 6
RULES = (Quota(2), RandomReveal(2), Threshold(0.3), Factor(1.5), Entropy(2), Margin(2), EntropyBound(2.0))
POLICIES = (
    NoCache(),
    PrefixCache(),
    DualCache(),
    DelayedCache(refresh=3),
    DelayedCache(refresh=3, keep_prompt=True),
    FreeCache(block_size=3),
    FreeCache(policy="aggressive"),
    FreeCache(policy="sliding", window=3),
    FreeCache(policy="aggressive", freeze="official"),
    WindowCache(external=6, internal=2, refresh=3),
    WindowCache(external=6, internal=2, refresh=3, far_field=True, forced=True, slide=False),
)
RENEWED = (
    PrefixCache(refresh=1),
    DualCache(refresh=1),
    DelayedCache(refresh=1),
    FreeCache(freeze="never"),
    WindowCache(external=16, internal=15, refresh=1),
)


def run(model: Any, rule: Any, policy: Any, new: int = NEW, **settings: Any) -> tuple[Tensor, Any]:
    ids, mask = toys.prompts()
    decoder = Diffusion(rule, policy, **({"seed": 0} | settings))
    return decoder.generate(model, ids, attention_mask=mask, max_new_tokens=new), decoder.trace


@pytest.mark.parametrize("kind", [*toys.KINDS, "qwen3", "eager"])
def test_a_policy_that_renews_at_each_pass_is_no_cache(kind: str) -> None:
    """Family property 8: with a refresh at each pass, tokens and counts are those without a cache."""
    made: dict[str, Any] = {"qwen3": toys.qwen3, "eager": lambda: toys.random_model(attn="eager")}
    model = made.get(kind, lambda: toys.random_model(kind, layers=3))()
    for rule, shift in ((Threshold(0.3), False), (RandomReveal(2), True)):
        settings: dict[str, Any] = {"block_length": 4, "logits_shift": shift, "temperature": 0.7}
        wanted, plain = run(model, rule, NoCache(), 8, **settings)
        for policy in RENEWED:
            found, trace = run(model, rule, policy, 8, **settings)
            assert torch.equal(found, wanted), policy
            assert trace.row_calls == plain.row_calls
            assert trace.positions == plain.positions


@pytest.mark.parametrize("policy", RENEWED, ids=repr)
def test_logits_of_a_renewed_cache_are_those_of_a_full_pass(policy: Any) -> None:
    """Family property 8: the same, in logits, to 1e-5."""
    seen: dict[str, list[Tensor]] = {"none": [], "cached": []}
    model = toys.random_model("qwen2")
    for name, one in (("none", NoCache()), ("cached", policy)):
        handle = model.lm_head.register_forward_hook(lambda _m, _i, out, name=name: seen[name].append(out.clone()))
        run(model, Quota(1), one)
        handle.remove()
    # The cached run has two passes more, which probe the cache.
    for full, cached in zip(seen["none"][-NEW:], seen["cached"][-NEW:], strict=True):
        for row, pads in enumerate((0, 4, 1)):
            keep = 9 + NEW - pads
            torch.testing.assert_close(full[row, :keep], cached[row, :keep], atol=1e-5, rtol=1e-5)


def test_a_dual_cache_on_one_layer_is_exact_while_frozen_tokens_stay() -> None:
    """Family property 8: with one layer, keys and values depend on their own token alone, and outside the block none
    changes."""
    model = toys.random_model(layers=1)
    for rule in (Threshold(0.3), Quota(1)):
        wanted, plain = run(model, rule, NoCache(), 10, block_length=5)
        for policy in (DualCache(), PrefixCache(), FreeCache(block_size=5), DelayedCache(refresh=4)):
            found, trace = run(model, rule, policy, 10, block_length=5)
            assert torch.equal(found, wanted), policy
            assert trace.positions < plain.positions


def test_deeper_models_go_stale() -> None:
    """What makes the other tests say something: with several layers and no refresh, logits differ."""
    model = toys.random_model("qwen2")
    wanted, _ = run(model, Quota(1), NoCache(), 14, block_length=14)
    blocks, _ = run(model, Quota(1), NoCache(), 14, block_length=7)
    assert not torch.equal(run(model, Quota(1), DualCache(), 14, block_length=7)[0], blocks)
    assert not torch.equal(run(model, Quota(1), DelayedCache(refresh=9), 14, block_length=14)[0], wanted)


@pytest.mark.parametrize("policy", [PrefixCache(), FreeCache(block_size=3), FreeCache(policy="aggressive")], ids=repr)
def test_a_prefix_cache_is_exact_for_a_causal_model(policy: Any) -> None:
    """Family property 8: what stands in front of the block does not depend on it."""
    for kind, shift in zip(toys.KINDS, (False, True, True), strict=True):
        model: Any = models.tiny(kind, vocab=toys.VOCAB, layers=3)
        settings: dict[str, Any] = {
            "block_length": 3, "causal": True, "mask_token_id": toys.MASK, "logits_shift": shift
        }  # fmt: skip
        wanted, plain = run(model, Threshold(0.5), NoCache(), 8, **settings)
        found, trace = run(model, Threshold(0.5), policy, 8, **settings)
        assert torch.equal(found, wanted)
        assert trace.positions < plain.positions


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_rows_of_a_batch_are_the_rows_alone(rule: Any, policy: Any) -> None:
    """Family property 9: prompts of three lengths, padded on the left, for every rule and every policy."""
    model, (ids, mask) = toys.random_model(), toys.prompts()
    settings: dict[str, Any] = {"block_length": 4, "steps": 6, "temperature": 0.5, "logits_shift": rule == RULES[2]}
    out, trace = run(model, rule, policy, seed=30, **settings)
    make = lambda row: Diffusion(rule, policy, seed=30 + row, **settings)  # noqa: E731
    for row, (alone, own) in enumerate(toys.rows_alone(make, model, ids, mask, NEW)):
        assert torch.equal(out[row, 9:], alone)
        assert own.row_calls[0] == trace.row_calls[row]
        assert own.row_positions[0] == trace.row_positions[row]


@pytest.mark.parametrize("kind", ["qwen2", "gemma3"])
@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_rows_of_a_batch_on_other_classes(kind: str, policy: Any) -> None:
    model, (ids, mask) = toys.random_model(kind, layers=3), toys.prompts()
    out, _ = run(model, Threshold(0.2), policy, block_length=4)
    make = lambda _: Diffusion(Threshold(0.2), policy, block_length=4)  # noqa: E731
    for row, (alone, _) in enumerate(toys.rows_alone(make, model, ids, mask, NEW)):
        assert torch.equal(out[row, 9:], alone)


def test_one_block_is_no_blocks_and_blocks_go_from_left_to_right() -> None:
    """Family property 11: K = G equals no blocks, and a block starts when those in front of it are full."""
    model = toys.random_model()
    for rule in (Threshold(0.3), Quota(1)):
        assert torch.equal(run(model, rule, None, 12)[0], run(model, rule, None, 12, block_length=12)[0])
        _, trace = run(model, rule, None, 12, block_length=5, history=True)
        for answers in trace.history:
            masked = answers == toys.MASK
            for start in (5, 10):
                begun = (~masked[:, start:]).any(1)
                assert not (masked[:, :start].any(1) & begun).any()


def test_positions_follow_the_formulas() -> None:
    """What each policy feeds: prompt 9, three blocks of 4, one token a pass."""
    model, ids = toys.random_model(), toys.prompts()[0][:1]

    def fed(policy: Any, **settings: Any) -> int:
        decoder = Diffusion(Quota(1), policy, block_length=4, **settings)
        decoder.generate(model, ids, max_new_tokens=12)
        assert decoder.trace.model_calls == 12
        return decoder.trace.positions

    size = 21
    assert fed(None) == 12 * size
    assert fed(PrefixCache()) == 3 * size + 3 * (12 + 8 + 4)
    assert fed(DualCache()) == 3 * size + 9 * 4
    assert fed(PrefixCache(), logits_shift=True) == 3 * size + 3 * (13 + 9 + 5)
    assert fed(DualCache(refresh=2)) == 6 * size + 6 * 4
    masked = range(12, 0, -1)
    delayed = sum(size if i % 5 == 0 else left + 1 for i, left in enumerate(masked))
    assert fed(DelayedCache(refresh=5)) == delayed
    kept = sum((size if i == 0 else 12) if i % 5 == 0 else left + 1 for i, left in enumerate(masked))
    assert fed(DelayedCache(refresh=5, keep_prompt=True)) == kept


def test_flops_of_a_run_are_the_sum_over_passes() -> None:
    model, ids = toys.random_model(), toys.prompts()[0][:1]
    decoder = Diffusion(Quota(1), DualCache(), block_length=4)
    decoder.generate(model, ids, max_new_tokens=8)
    from tokenmill.diffuse import Denoiser

    made = Denoiser(model, mask_token_id=toys.MASK)
    assert decoder.trace.flops == pytest.approx(2 * made.flops(17, 17) + 6 * made.flops(4, 17))
    assert decoder.trace.refreshes == 2


def test_a_token_is_fed_once_more_after_it_was_revealed() -> None:
    """The delayed cache drops a token from the passes behind the one that fed it as itself."""
    model, ids = toys.random_model(), toys.prompts()[0][:1]
    fed: list[Tensor] = []
    handle = model.model.embed_tokens.register_forward_hook(lambda _m, args, _o: fed.append(args[0][0].clone()))
    decoder = Diffusion(Quota(1), DelayedCache(refresh=50), history=True)
    decoder.generate(model, ids, max_new_tokens=6)
    handle.remove()
    for step, tokens in enumerate(fed[-5:], start=1):
        before = decoder.trace.history[step - 1][0]
        new = before[(decoder.trace.history[step - 2][0] == toys.MASK) & (before != toys.MASK)] if step > 1 else None
        assert (tokens == toys.MASK).sum() == (before == toys.MASK).sum()
        real = tokens[tokens != toys.MASK]
        assert real.numel() == 1
        if new is not None:
            assert real.tolist() == new.tolist()


@pytest.mark.parametrize("cls", [PrefixCache, DualCache, DelayedCache])
def test_a_refresh_is_a_count(cls: Any) -> None:
    for bad in (0, -3, True):
        with pytest.raises(LimitError, match="refresh"):
            cls(refresh=bad)
    with pytest.raises(dataclasses.FrozenInstanceError):
        cls().refresh = 3
