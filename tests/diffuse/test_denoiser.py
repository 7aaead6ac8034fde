from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.diffuse import toys
from tokenmill import models
from tokenmill.diffuse import Denoiser, Diffusion, NoCache, PrefixCache, Quota, Threshold
from tokenmill.errors import LimitError, UnsupportedError


def denoiser(model: Any, **settings: Any) -> Denoiser:
    return Denoiser(model, **({"mask_token_id": toys.MASK} | settings))


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", toys.KINDS)
def test_a_bidirectional_model_passes_the_probe_and_a_causal_one_is_named(kind: str, attn: str) -> None:
    """Family property 1: another last token moves earlier logits, and with a causal model it does not."""
    good = toys.random_model(kind, attn=attn)
    denoiser(good).check_bidirectional()
    causal = models.tiny(kind, vocab=toys.VOCAB, attn=attn)
    calls = toys.count_calls(causal)
    with pytest.raises(UnsupportedError, match=f"{type(causal).__name__} is causal"):
        Diffusion(Quota(1), mask_token_id=toys.MASK).generate(causal, toys.prompts()[0], max_new_tokens=4)
    assert calls == [1]
    assert denoiser(causal, causal=True).check_bidirectional() is None


def test_other_classes_pass_the_probe() -> None:
    for model in (toys.qwen3(), toys.encoder("bert"), toys.encoder("modernbert"), toys.Llada(), toys.Dream()):
        calls = toys.count_calls(model)
        denoiser(model).check_bidirectional()
        denoiser(model).check_bidirectional()
        assert calls == [1], "what is known about a model is kept"


def test_a_probe_is_repeated_when_the_configuration_changes() -> None:
    model = toys.random_model()
    denoiser(model).check_bidirectional()
    model.config.is_causal = True
    with pytest.raises(UnsupportedError, match="causal"):
        denoiser(model).check_bidirectional()


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", [*toys.KINDS, "qwen3"])
def test_a_pass_is_the_models_own_and_padding_is_invisible(kind: str, attn: str) -> None:
    model = toys.qwen3() if kind == "qwen3" else toys.random_model(kind, attn=attn)
    model.set_attn_implementation(attn)
    ids, mask = toys.prompts(length=30)
    made = denoiser(model).logits(ids, real=mask.bool())
    assert (made.logits[..., toys.MASK] == -torch.inf).all()
    for row in range(3):
        own = int(mask[row].sum())
        with torch.no_grad():
            plain = model(ids[row : row + 1, 30 - own :]).logits[0]
        torch.testing.assert_close(made.logits[row, :own, : toys.MASK], plain[:, : toys.MASK], atol=2e-4, rtol=1e-4)
        assert made.targets[row, :own].tolist() == list(range(30 - own, 30))
        assert made.valid[row].tolist() == [True] * own + [False] * (30 - own)


@pytest.mark.parametrize("kind", ["bert", "modernbert", "llada", "dream"])
def test_encoders_and_foreign_modules_decode_padded_batches_without_a_cache(kind: str) -> None:
    made: dict[str, Any] = {"llada": toys.Llada, "dream": toys.Dream}
    model = made[kind]() if kind in made else toys.encoder(kind)
    ids, mask = toys.prompts()
    settings: dict[str, Any] = {"mask_token_id": toys.MASK, "block_length": 4, "logits_shift": kind == "dream"}
    decoder = Diffusion(Threshold(0.2), **settings)
    out = decoder.generate(model, ids, max_new_tokens=9, attention_mask=mask)
    calls = decoder.trace.row_calls
    for row, (alone, trace) in enumerate(toys.rows_alone(lambda _: decoder, model, ids, mask, 9)):
        assert torch.equal(out[row, 9:], alone)
        assert trace.row_calls[0] == calls[row]
    assert decoder.trace.flops > 0
    with pytest.raises(UnsupportedError, match="NoCache"):
        Diffusion(Threshold(0.2), PrefixCache(), **settings).generate(model, ids, max_new_tokens=4)


def test_a_module_that_ignores_the_mask_may_not_pad() -> None:
    ids, mask = toys.prompts()
    decoder = Diffusion(Threshold(0.2), mask_token_id=toys.MASK)
    with pytest.raises(UnsupportedError, match="attends to padding"):
        decoder.generate(toys.Llada(deaf=True), ids, max_new_tokens=4, attention_mask=mask)
    assert decoder.generate(toys.Llada(deaf=True), ids, max_new_tokens=4).shape == (3, 13)


def test_a_cache_that_is_not_kept_is_found() -> None:
    class Forgetful(toys.Dream):
        """Takes a cache and does not look at it."""

        def forward(self, input_ids: Any, attention_mask: Any = None, position_ids: Any = None,  # type: ignore[override]
                    past_key_values: Any = None, use_cache: bool = False) -> Any:  # fmt: skip
            if past_key_values is None:
                return super().forward(input_ids, attention_mask, position_ids)
            states = torch.zeros(*input_ids.shape, 1, 1).transpose(1, 2)
            past_key_values.update(states, states, 0)
            return super().forward(input_ids, None, position_ids)

    model = Forgetful()
    model.config.num_hidden_layers = 1
    settings: dict[str, Any] = {"mask_token_id": toys.MASK, "logits_shift": True}
    with pytest.raises(UnsupportedError, match="does not recompute single places"):
        Diffusion(Quota(1), PrefixCache(), **settings).generate(model, toys.prompts()[0], max_new_tokens=4)


@pytest.mark.parametrize("kind", toys.KINDS)
def test_a_causal_model_with_the_shift_from_left_to_right_is_plain_greedy(kind: str) -> None:
    """Family property 10: a causal model, used with the shift and one token a pass, decodes as `generate` does."""
    model: Any = models.tiny(kind, vocab=toys.VOCAB)
    ids, mask = toys.prompts()
    bad = [[toys.MASK]]
    plain = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, bad_words_ids=bad)
    for cache in (NoCache(), PrefixCache()):
        decoder = Diffusion(Quota(1), cache, block_length=1, mask_token_id=toys.MASK, logits_shift=True, causal=True)
        ours = decoder.generate(model, ids, attention_mask=mask, max_new_tokens=12)
        assert torch.equal(ours, plain)


def test_shifted_targets_stand_one_place_behind() -> None:
    model = toys.random_model()
    ids, mask = toys.prompts()
    plain = denoiser(model).logits(ids, real=mask.bool())
    shifted = denoiser(model, logits_shift=True).logits(ids, real=mask.bool())
    assert torch.equal(plain.logits, shifted.logits)
    assert torch.equal(shifted.targets[0, :-1], plain.targets[0, :-1] + 1)
    assert not shifted.valid[0, -1]


def test_any_set_of_places_through_the_cache_gives_the_full_pass() -> None:
    ids, mask = toys.prompts(length=24)
    real = mask.bool()
    generator = torch.Generator().manual_seed(0)
    for kind in (*toys.KINDS, "qwen3"):
        model = toys.qwen3() if kind == "qwen3" else toys.random_model(kind)
        made = denoiser(model)
        full = made.logits(ids, real=real)
        whole = torch.zeros(3, 24, toys.VOCAB).scatter(1, full.targets[..., None].expand_as(full.logits), full.logits)
        cache = made.new_cache(3, 24)
        torch.testing.assert_close(made.logits(ids, real=real, cache=cache).logits[full.valid], full.logits[full.valid])
        for _ in range(3):
            some = real & (torch.rand(3, 24, generator=generator) < 0.3)
            found = made.logits(ids, real=real, compute=some, read=real, cache=cache)
            wanted = whole.gather(1, found.targets[..., None].expand_as(found.logits))
            torch.testing.assert_close(found.logits[found.valid], wanted[found.valid], atol=2e-4, rtol=1e-4)
            assert found.queries.tolist() == some.sum(1).tolist()
            assert found.keys.tolist() == real.sum(1).tolist()


def test_a_row_without_a_place_to_feed_stays_out() -> None:
    model, (ids, _) = toys.random_model(), toys.prompts()
    made = denoiser(model)
    compute = torch.ones_like(ids, dtype=torch.bool)
    compute[1] = False
    cache = made.new_cache(3, 9)
    found = made.logits(ids, compute=compute, cache=cache)
    assert found.queries.tolist() == [9, 0, 9]
    assert found.valid.any(1).tolist() == [True, False, True]
    torch.testing.assert_close(found.logits[0], made.logits(ids[:1]).logits[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        made.logits(ids, compute=~compute, cache=cache).logits[1], made.logits(ids[1:2]).logits[0], atol=1e-4, rtol=1e-4
    )


def test_frozen_places_are_not_fed() -> None:
    made, (ids, _) = denoiser(toys.random_model()), toys.prompts()
    compute = torch.ones_like(ids, dtype=torch.bool)
    compute[:, :3] = False
    assert made.logits(ids, compute=compute, frozen=torch.tensor([3, 0, 2])).queries.tolist() == [6, 6, 6]
    with pytest.raises(LimitError, match="frozen"):
        made.logits(ids, compute=compute, frozen=torch.tensor([3, 4, 2]))


def test_suppressed_ids_never_come_out() -> None:
    model, (ids, _) = toys.random_model(), toys.prompts()
    plain = Diffusion(Quota(2)).generate(model, ids, max_new_tokens=10)[:, 9:]
    often = tuple(plain.flatten().unique().tolist())[:3]
    ours = Diffusion(Quota(2), suppress_tokens=often).generate(model, ids, max_new_tokens=10)[:, 9:]
    assert not torch.isin(ours, torch.tensor(often)).any()
    assert torch.isin(plain, torch.tensor(often)).any()


def test_a_mask_that_the_model_wants_to_say_is_never_said() -> None:
    class Eager(toys.Llada):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            logits = super().forward(*args, **kwargs).logits
            logits[..., toys.MASK] = 100.0
            return SimpleNamespace(logits=logits)

    out = Diffusion(Quota(1), mask_token_id=toys.MASK).generate(Eager(), toys.prompts()[0], max_new_tokens=6)
    assert not (out == toys.MASK).any()


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"mask_token_id": toys.VOCAB}, "mask_token_id = 32"),
        ({"mask_token_id": -1}, "mask_token_id = -1"),
        ({"eos_token_ids": (3, 99)}, "eos_token_ids = 99"),
        ({"eos_token_ids": (3, toys.MASK)}, "end ids"),
        ({"suppress_tokens": (77,)}, "77"),
    ],
)
def test_ids_outside_the_vocabulary_or_that_coincide_are_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(LimitError, match=text):
        denoiser(toys.random_model(), **settings)


def test_flops_follow_the_formula() -> None:
    bidirectional: dict[str, Any] = {"is_causal": False}
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, head_dim=12,
        num_key_value_heads=1, **bidirectional,
    )  # fmt: skip
    made = denoiser(LlamaForCausalLM(config))
    per_layer = 16 * 24 + 2 * 16 * 12 + 24 * 16 + 3 * 16 * 24
    assert made.flops(5, 11) == 2 * 5 * (3 * per_layer + 16 * 40) + 4 * 3 * 2 * 12 * 5 * 11


def test_flash_attention_is_refused() -> None:
    model = toys.random_model()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UnsupportedError, match="flash"):
        denoiser(model)
