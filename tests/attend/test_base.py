"""What holds for every method of the family, on every shape of model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
)

from tests.prune import vlms
from tokenmill import attend, decode
from tokenmill.errors import LimitError, UnsupportedError
from tokenmill.laws.general import fingerprint

from .methods import IDS, KINDS, PADDING, SMALL, cases, disturb, full, model, run, steps

CASES = cases()


@pytest.mark.prop("tokenselect", 1)
@pytest.mark.parametrize("padding", [None, PADDING])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_budget_above_the_length_is_dense_attention(kind: str, attn: str, padding: Any) -> None:
    dense = model(kind, attn=attn)
    mask = torch.ones_like(IDS) if padding is None else padding
    real = mask.bool()
    want, stepwise = run(dense, IDS, mask).logits, steps(dense, IDS, mask, 35)
    for name, method in CASES.items():
        with full(method).attach(dense) as trace:
            found, later = run(dense, IDS, mask).logits, steps(dense, IDS, mask, 35)
        torch.testing.assert_close(found[real], want[real], atol=1e-5, rtol=1e-5, msg=name)
        torch.testing.assert_close(later, stepwise, atol=1e-5, rtol=1e-5, msg=name)
        assert trace.sparse_calls == 0
        assert trace.density == 1


@pytest.mark.parametrize("kind", KINDS)
def test_back_ends_agree_and_padded_rows_are_as_alone(kind: str) -> None:
    sdpa, eager = model(kind), model(kind, attn="eager")
    for name, method in CASES.items():
        with method.attach(sdpa) as trace:
            found = steps(sdpa, IDS, PADDING, 34)
        assert trace.sparse_calls, name
        with method.attach(eager):
            torch.testing.assert_close(steps(eager, IDS, PADDING, 34), found, atol=1e-4, rtol=1e-4, msg=name)
        if name.startswith("quest"):
            continue  # pages begin at the first slot, so padding moves their borders
        for row, start in ((0, 9), (1, 0)):
            with method.attach(sdpa):
                ids = IDS[row : row + 1, start:]
                alone = steps(sdpa, ids, torch.ones_like(ids), 34 - start)
            torch.testing.assert_close(found[row : row + 1], alone, atol=1e-4, rtol=1e-4, msg=f"{name} {row}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_no_future_and_no_padded_key_is_ever_read(kind: str, name: str) -> None:
    tiny = model(kind, layers=1)
    with CASES[name].attach(tiny):
        before, changed = run(tiny, IDS, PADDING).logits, False
        for column in (39, 33, 20):
            hooks = disturb(tiny, 0, column)
            after = run(tiny, IDS, PADDING).logits
            for hook in hooks:
                hook.remove()
            assert torch.equal(after[0, 9:column], before[0, 9:column])
            assert torch.equal(after[1], before[1])
            changed |= not torch.equal(after[0, column:], before[0, column:])
        assert changed, "the hooks change nothing, so nothing was tried out"
        hooks = disturb(tiny, 0, 5)
        after = run(tiny, IDS, PADDING).logits
        for hook in hooks:
            hook.remove()
        assert torch.equal(after[0, 9:], before[0, 9:])
        assert torch.equal(after[1], before[1])


@pytest.mark.parametrize("name", CASES)
def test_decoding_never_reads_padding(name: str) -> None:
    tiny = model("qwen2", layers=1)
    with CASES[name].attach(tiny):
        before = steps(tiny, IDS, PADDING, 30)
        hooks = disturb(tiny, 0, 4)
        after = steps(tiny, IDS, PADDING, 30)
        for hook in hooks:
            hook.remove()
        assert torch.equal(after, before)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_given_back(kind: str, name: str) -> None:
    tiny = model(kind)
    before, want = fingerprint(tiny), run(tiny, IDS).logits
    with CASES[name].attach(tiny):
        tiny.generate(input_ids=IDS, attention_mask=PADDING, max_new_tokens=3, do_sample=False)
    assert fingerprint(tiny).keys() == before.keys()
    assert torch.equal(run(tiny, IDS).logits, want)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = tiny.lm_head.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt), CASES[name].attach(tiny):
        run(tiny, IDS)
    hook.remove()
    after = fingerprint(tiny)
    assert all(after[key][:1] == before[key][:1] for key in before if key.startswith("tensor"))
    assert all(after[key] == before[key] for key in before if not key.startswith("tensor"))
    assert torch.equal(run(tiny, IDS).logits, want)


def test_only_chosen_layers_change() -> None:
    tiny = model("gemma3")  # full layers are 2 and 5
    method = attend.TokenSelect(**SMALL, layers=(5,))
    with method.attach(tiny) as one:
        run(tiny, IDS)
    with attend.TokenSelect(**SMALL).attach(tiny) as both:
        run(tiny, IDS)
    assert both.keys_read == 2 * one.keys_read
    assert both.selections == 2 * one.selections
    assert both.model_calls == one.model_calls == 1
    assert both.positions == one.positions == IDS.numel()
    with method.attach(tiny), attend.OracleTopK(keep=6, layers=(2,)).attach(tiny) as oracle:
        nested = run(tiny, IDS).logits
    assert oracle.sparse_calls
    assert not torch.equal(nested, run(tiny, IDS).logits)


def test_counts_of_a_decoding_step() -> None:
    tiny = model("qwen2", layers=1)  # 2 KV heads of 8 channels, float32
    with attend.TokenSelect(**SMALL, theta=None).attach(tiny) as trace:
        cache = run(tiny, IDS[:, :39]).past_key_values
        before = trace.counts()
        run(tiny, IDS[:, 39:], cache=cache, at=39)
    read, scored = (trace.counts()[name] - before[name] for name in ("keys_read", "keys_scored"))
    assert read == 2 * 2 * 10  # rows, KV heads, 2 sinks + 3 + 5
    assert scored == 2 * 2 * (40 - 7)
    assert trace.bytes_read - before["bytes_read"] == (read * 16 + scored * 8) * 4
    assert trace.keys_dense - before["keys_dense"] == 2 * 2 * 40


@pytest.mark.parametrize("name", ["tokenselect original", "oracle", "streaming original", "quest"])
def test_a_static_cache_is_read_up_to_its_end(name: str) -> None:
    tiny = model("qwen2")
    method = CASES[name]
    if name.startswith("tokenselect"):
        method = attend.TokenSelect(**SMALL, positions="original", theta=None)
    if name == "quest":
        with method.attach(tiny), pytest.raises(UnsupportedError, match="StaticLayer"):
            steps(tiny, IDS, PADDING, 28, StaticCache(config=tiny.config, max_cache_len=64))
        return
    with method.attach(tiny):
        want = steps(tiny, IDS, PADDING, 28)
        found = steps(tiny, IDS, PADDING, 28, StaticCache(config=tiny.config, max_cache_len=64))
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_it_generates_with_beams_and_in_chunks(name: str) -> None:
    tiny = model("qwen2")
    settings: dict[str, Any] = {"attention_mask": PADDING, "max_new_tokens": 4, "do_sample": False}
    with CASES[name].attach(tiny) as trace:
        assert tiny.generate(input_ids=IDS, num_beams=3, **settings).shape == (2, 44)
        assert tiny.generate(input_ids=IDS, prefill_chunk_size=7, **settings).shape == (2, 44)
        assert trace.sparse_calls


def _mistral() -> Any:
    return MistralForCausalLM(MistralConfig(**TINY, sliding_window=16, num_key_value_heads=2))


def _alibi() -> Any:
    tiny = LlamaForCausalLM(LlamaConfig(**TINY))
    del tiny.model.rotary_emb
    return tiny


def _dynamic() -> Any:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    return LlamaForCausalLM(LlamaConfig(**TINY, rope_parameters=rope))


def _mla() -> Any:
    more: dict[str, Any] = {
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    }
    return DeepseekV3ForCausalLM(DeepseekV3Config(**TINY, **more, first_k_dense_replace=2, n_routed_experts=8))


TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (_mistral, "sliding_attention"),
        (_alibi, "no rotary positions"),
        (_dynamic, "'dynamic' depend on the length"),
        (_mla, "in a way of its own"),
    ],
)
def test_models_that_do_not_fit_are_refused_before_they_run(make: Any, says: str) -> None:
    tiny = make()
    with pytest.raises(UnsupportedError, match=says), attend.TokenSelect().attach(tiny):
        pytest.fail("it was attached")


def test_original_positions_need_no_rotation() -> None:
    tiny = _mla().eval()
    with attend.TokenSelect(**SMALL, positions="original").attach(tiny) as trace:
        steps(tiny, IDS, PADDING, 30)
    assert trace.sparse_calls


def test_layers_that_do_not_fit_are_refused() -> None:
    tiny = model("gemma3")
    with pytest.raises(UnsupportedError, match="sliding_attention"), attend.OracleTopK(layers=(0,)).attach(tiny):
        pytest.fail("it was attached")
    with pytest.raises(LimitError, match="layers"), attend.OracleTopK(layers=(9,)).attach(tiny):
        pytest.fail("it was attached")
    with pytest.raises(LimitError, match="layers"), attend.OracleTopK(layers=()).attach(tiny):
        pytest.fail("it was attached")


def test_a_cache_from_before_needs_original_positions() -> None:
    tiny = model("llama")
    cache = run(tiny, IDS[:, :30]).past_key_values
    with attend.TokenSelect(**SMALL).attach(tiny), pytest.raises(UnsupportedError, match="30 keys from before"):
        run(tiny, IDS[:, 30:31], cache=cache, at=30)
    cache = run(tiny, IDS[:, :30]).past_key_values
    with attend.TokenSelect(**SMALL, positions="original").attach(tiny) as trace:
        run(tiny, IDS[:, 30:31], cache=cache, at=30)
    assert trace.selections


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
def test_it_reads_pictures_in_multimodal_models(kind: str) -> None:
    tiny, inputs = vlms.model(kind), vlms.inputs(kind, rows=2)
    with torch.no_grad():
        want = tiny(**inputs).logits
    for name, method in CASES.items():
        if kind == "qwen2_5_vl" and getattr(method, "needs_rotary", False):
            with pytest.raises(UnsupportedError, match="in a way of its own"), method.attach(tiny):
                pytest.fail("it was attached")
            continue
        with full(method).attach(tiny), torch.no_grad():
            torch.testing.assert_close(tiny(**inputs).logits, want, msg=name)
        with method.attach(tiny) as trace:
            out = tiny.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert out.shape[1] == inputs["input_ids"].shape[1] + 3
        assert trace.sparse_calls, name


def test_a_method_serves_a_decoder_that_drafts() -> None:
    tiny = model("qwen2")
    decoder = decode.TokenRecycling(tree="15")
    with attend.TokenSelect(**SMALL).attach(tiny) as trace:
        out = tiny.generate(input_ids=IDS[:1], custom_generate=decoder, max_new_tokens=12, do_sample=False)
    assert out.shape == (1, 52)
    assert trace.sparse_calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_finite_and_what_it_is(dtype: torch.dtype) -> None:
    tiny = model("qwen2").to(dtype)
    for name, method in CASES.items():
        with method.attach(tiny):
            found = run(tiny, IDS, PADDING).logits, steps(tiny, IDS, PADDING, 37)
        assert all(out.dtype == dtype and torch.isfinite(out).all() for out in found), name
