from __future__ import annotations

import copy
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    StaticCache,
)

import tokenmill.models as models
from tests.hf import vlms
from tokenmill import hf
from tokenmill.errors import LimitError, UnsupportedError

KINDS = ("llama", "qwen2", "gemma3")
IDS = torch.randint(1, 64, (2, 30), generator=torch.Generator().manual_seed(1))
PADDING = torch.ones_like(IDS)
PADDING[0, :7] = 0
Output = tuple[Tensor, Tensor | None]


def through(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *, call: hf.Call, **kw: Any) -> Output:
    """Writes down its call and runs what the model would have run."""
    if call.state is not None:
        call.state.append((call.layer_idx, mask))
    return call.inner(module, query, key, value, mask, **kw)


def naive(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *, call: hf.Call, **kw: Any) -> Output:
    """Dense attention written out, from the boolean mask alone."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query @ key.mT) * kw["scaling"]
    hidden = ~hf.visible(mask, query, key)
    weights = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), None


def zero(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *, call: hf.Call, **kw: Any) -> Output:
    return torch.zeros_like(query).transpose(1, 2).contiguous(), None


def last_key(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *, call: hf.Call, **kw: Any) -> Output:
    """Narrows the mask to the diagonal and lets the model's own function work with it."""
    q, k = query.shape[2], key.shape[2]
    own = torch.eye(k, dtype=torch.bool)[k - q :].expand(1, 1, q, k)
    return call.inner(module, query, key, value, own, **kw)


@pytest.fixture(scope="module", autouse=True)
def _pairs() -> None:
    hf.register("test-through", through)
    hf.register("test-through-none", through, mask="sdpa")
    hf.register("test-through-float", through, mask="eager")
    hf.register("test-naive", naive)
    hf.register("test-zero", zero)
    hf.register("test-last-key", last_key)


def logits(model: PreTrainedModel, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(**kwargs).logits


def generate(model: Any, **kwargs: Any) -> Tensor:
    out = model.generate(max_new_tokens=12, do_sample=False, **kwargs)
    assert isinstance(out, Tensor)
    return out


def settings(model: PreTrainedModel) -> list[Any]:
    """Everything of a model that attaching touches."""
    configs = [m.config for m in model.modules() if isinstance(m, PreTrainedModel)]
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._forward_hooks_always_called)) for m in model.modules()
    ]
    return [[(c.to_dict(), c._attn_implementation) for c in configs], hooks, [sorted(vars(m)) for m in model.modules()]]


@pytest.mark.parametrize("padding", [None, PADDING])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_passing_on_is_bit_identical(kind: str, attn: str, padding: Tensor | None) -> None:
    model: Any = models.tiny(kind, attn=attn)
    inputs = {"input_ids": IDS, "attention_mask": padding}
    plain, text = logits(model, **inputs), generate(model, **inputs)
    for name in ("test-through", "test-through-none", "test-through-float"):
        for layers in (None, [0], "full_attention"):
            seen: list[Any] = []
            with hf.attached(model, name, layers=layers, state=seen) as state:
                assert state is seen
                assert torch.equal(logits(model, **inputs), plain)
                assert torch.equal(generate(model, **inputs), text)
            types = hf.layer_types(model)
            wanted = {None: set(range(len(types))), "full_attention": {i for i, t in enumerate(types) if t[0] == "f"}}
            assert {index for index, _ in seen} == (wanted[layers] if layers != [0] else {0})


@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_right_in_prefill_chunks_and_decoding(kind: str) -> None:
    model: Any = models.tiny(kind)
    plain = logits(model, input_ids=IDS, attention_mask=PADDING)
    positions = (PADDING.cumsum(-1) - 1).clamp(min=0)
    with hf.attached(model, "test-naive"):
        ours = logits(model, input_ids=IDS, attention_mask=PADDING, position_ids=positions)
        reference = model(IDS, attention_mask=PADDING, position_ids=positions, use_cache=False).logits
        cache, parts = None, []
        for start, stop in [(0, 9), (9, 21), (21, 22), (22, 30)]:
            piece = {"attention_mask": PADDING[:, :stop], "position_ids": positions[:, start:stop]}
            with torch.no_grad():
                out = model(IDS[:, start:stop], past_key_values=cache, use_cache=True, **piece)
            cache = out.past_key_values
            parts.append(out.logits)
    real = PADDING.bool()
    plain = logits(model, input_ids=IDS, attention_mask=PADDING, position_ids=positions)
    for found in (ours, reference, torch.cat(parts, 1)):
        torch.testing.assert_close(found[real], plain[real], atol=2e-4, rtol=1e-4)


def test_the_default_mask_is_always_boolean() -> None:
    model: Any = models.tiny("gemma3")
    seen: list[Any] = []
    with hf.attached(model, "test-through", state=seen):
        generate(model, input_ids=IDS)
    assert len(seen) == 12 * 6
    assert all(mask.dtype == torch.bool and mask.dim() == 4 for _, mask in seen)
    assert seen[0][1].shape == (2, 1, 30, 30)
    assert torch.equal(seen[2][1][0, 0], torch.ones(30, 30).tril().bool())
    assert int(seen[0][1][0, 0, -1].sum()) == 16  # the window of a sliding layer
    # float masks, and None where the mask is trivial, on request
    for name, kind in [("test-through-float", torch.float32), ("test-through-none", type(None))]:
        seen.clear()
        with hf.attached(model, name, layers=[2], state=seen):
            logits(model, input_ids=IDS)
        mask = seen[0][1]
        assert mask is None if kind is type(None) else mask.dtype == kind


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_inner_takes_a_mask_of_our_own(attn: str) -> None:
    model: Any = models.tiny("qwen2", attn=attn)
    with hf.attached(model, "test-last-key"):
        found = logits(model, input_ids=IDS)
    # Every token sees itself alone, so the others do not matter.
    shuffled = IDS.clone()
    shuffled[:, :-1] = IDS[:, :-1].flip(1)
    with hf.attached(model, "test-last-key"):
        again = logits(model, input_ids=shuffled)
    torch.testing.assert_close(again[:, -1], found[:, -1])
    assert not torch.allclose(logits(model, input_ids=IDS)[:, -1], found[:, -1])


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_only_the_chosen_layers_change(attn: str) -> None:
    model: Any = models.tiny("gemma3", attn=attn)
    expected = models.tiny("gemma3", attn=attn)
    for index in (1, 4):
        torch.nn.init.zeros_(expected.model.layers[index].self_attn.o_proj.weight)
    with hf.attached(model, "test-zero", layers=(4, 1)):
        found = logits(model, input_ids=IDS, attention_mask=PADDING)
    assert torch.equal(found, logits(expected, input_ids=IDS, attention_mask=PADDING))


@pytest.mark.parametrize("make", [lambda: models.tiny("gemma3"), lambda: vlms.build("llava")[0]])
def test_the_model_is_given_back_even_after_errors(make: Any) -> None:
    model = make()
    before = settings(model)
    weights = copy.deepcopy(model.state_dict())

    def fail_inside() -> None:
        with hf.attached(model, "test-through"):
            assert settings(model) != before
            with hf.attached(model, "test-zero", layers=[0]):
                logits(model, input_ids=IDS)
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert settings(model) == before
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_blocks_nest_and_may_end_in_any_order() -> None:
    model: Any = models.tiny("llama")
    plain = logits(model, input_ids=IDS)
    outer, inner = hf.attached(model, "test-zero", layers=[0]), hf.attached(model, "test-through", state=(seen := []))
    outer.__enter__()
    zeroed = logits(model, input_ids=IDS)
    inner.__enter__()
    assert torch.equal(logits(model, input_ids=IDS), zeroed)  # the inner one passes on to the outer one
    assert {index for index, _ in seen} == {0, 1}
    outer.__exit__(None, None, None)
    assert torch.equal(logits(model, input_ids=IDS), plain)
    assert model.config._attn_implementation == "test-through"
    inner.__exit__(None, None, None)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(logits(model, input_ids=IDS), plain)


def test_models_that_share_a_config_do_not_share_the_attention() -> None:
    first = models.tiny("llama")
    config: Any = first.config
    second = LlamaForCausalLM(config).eval()
    assert second.config is first.config
    plain = logits(second, input_ids=IDS, attention_mask=PADDING)
    seen_first: list[Any] = []
    seen_second: list[Any] = []
    with hf.attached(first, "test-zero", state=seen_first):
        assert torch.equal(logits(second, input_ids=IDS, attention_mask=PADDING), plain)
        with hf.attached(second, "test-through", state=seen_second):
            assert torch.equal(logits(second, input_ids=IDS, attention_mask=PADDING), plain)
            seen_second.clear()
            logits(first, input_ids=IDS)
    assert seen_first == seen_second == []


def test_a_copy_of_an_attached_model_has_no_state() -> None:
    model: Any = models.tiny("llama")
    plain = logits(model, input_ids=IDS)
    with hf.attached(model, "test-through", state=(seen := [])):
        twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, input_ids=IDS), plain)
    assert seen == []


def test_threads_with_a_model_each() -> None:
    made = [models.tiny("llama", seed=seed) for seed in (0, 1)]
    plain = [generate(model, input_ids=IDS) for model in made]
    seen: list[list[Any]] = [[], []]
    equal = [False, False]
    barrier = threading.Barrier(2)

    def work(number: int) -> None:
        for _ in range(3):
            barrier.wait()
            with hf.attached(made[number], "test-through", layers=[number], state=seen[number]):
                equal[number] = torch.equal(generate(made[number], input_ids=IDS), plain[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert equal == [True, True]
    assert [{index for index, _ in calls} for calls in seen] == [{0}, {1}]
    assert [len(calls) for calls in seen] == [36, 36]


def test_a_second_thread_may_run_the_model_but_not_attach_to_it() -> None:
    model: Any = models.tiny("llama")
    seen: list[Any] = []
    errors: list[Exception] = []

    def work() -> None:
        generate(model, input_ids=IDS)
        try:
            with hf.attached(model, "test-zero"):
                pass
        except UnsupportedError as error:
            errors.append(error)

    with hf.attached(model, "test-through", state=seen):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert model.config._attn_implementation == "test-through"
    assert len(seen) == 24
    assert "another thread" in str(errors[0])


def test_the_call_brings_cache_and_hidden_states() -> None:
    model: Any = models.tiny("gemma3")
    calls: list[tuple[hf.Call, int]] = []

    def look(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *, call: hf.Call, **kw: Any) -> Output:
        calls.append((call, key.shape[2]))
        assert call.hidden_states is not None
        assert call.hidden_states.shape == (query.shape[0], query.shape[2], 32)
        assert call.position_embeddings[0].shape[-2:] == (query.shape[2], 8)
        return call.inner(module, query, key, value, mask, **kw)

    hf.register("test-look", look)
    with hf.attached(model, "test-look"):
        out = model.generate(IDS, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
        assert [call.cache_layer for call, _ in calls[6:]] == out.past_key_values.layers
        assert calls[2][0].cache_layer.get_seq_length() == 31
        calls.clear()
        model(IDS, use_cache=False)
        assert all(call.cache_layer is None for call, _ in calls)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", vlms.KINDS)
def test_multimodal_models_switch_their_decoder_only(kind: str, attn: str) -> None:
    model, inputs = vlms.build(kind, attn)
    plain, text = logits(model, **inputs), generate(model, **inputs)
    for layers in (None, [1]):
        seen: list[Any] = []
        with hf.attached(model, "test-through", layers=layers, state=seen):
            assert model.config.text_config._attn_implementation == "test-through"
            assert model.config.vision_config._attn_implementation == attn
            assert torch.equal(logits(model, **inputs), plain)
            assert torch.equal(generate(model, **inputs), text)
        assert {index for index, _ in seen} == ({0, 1, 2} if layers is None else {1})
    with hf.attached(model, "test-naive"):
        torch.testing.assert_close(logits(model, **inputs), plain, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_bidirectional_models(attn: str) -> None:
    config = LlamaConfig(**{**vlms.TEXT, "is_causal": False, "attn_implementation": attn})
    model = LlamaForCausalLM(config).eval()
    plain = logits(model, input_ids=IDS, attention_mask=PADDING)
    with hf.attached(model, "test-through", layers=[0, 2]):
        assert torch.equal(logits(model, input_ids=IDS, attention_mask=PADDING), plain)
    with hf.attached(model, "test-naive"):
        found = logits(model, input_ids=IDS, attention_mask=PADDING)
    torch.testing.assert_close(found[PADDING.bool()], plain[PADDING.bool()], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_static_caches(attn: str) -> None:
    model: Any = models.tiny("llama", attn=attn)

    def run() -> list[Tensor]:
        cache = StaticCache(config=model.config, max_cache_len=48)
        steps = [(0, 20), (20, 21), (21, 30)]
        return [logits(model, input_ids=IDS[:, a:b], past_key_values=cache) for a, b in steps]

    plain = run()
    for name in ("test-through", "test-through-none"):
        with hf.attached(model, name, layers=[1]):
            assert all(torch.equal(a, b) for a, b in zip(run(), plain, strict=True))


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_a_sparse_model_keeps_its_own_selection(attn: str) -> None:
    sizes = {**vlms.TEXT, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8}
    sizes |= {"qk_rope_head_dim": 8, "v_head_dim": 8, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 6}
    sizes |= {"first_k_dense_replace": 3, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = DeepseekV32Config(**sizes, n_group=1, topk_group=1, attn_implementation=attn)  # type: ignore[arg-type]
    model = DeepseekV32ForCausalLM(config).eval()
    plain = logits(model, input_ids=IDS)
    with hf.attached(model, "test-through", layers=[0, 1]):
        torch.testing.assert_close(logits(model, input_ids=IDS), plain)


def test_a_name_set_by_hand_runs_without_state() -> None:
    model: Any = models.tiny("llama")
    plain = logits(model, input_ids=IDS, attention_mask=PADDING)
    model.set_attn_implementation("test-through")
    torch.testing.assert_close(logits(model, input_ids=IDS, attention_mask=PADDING), plain)


def test_visible_reads_every_form_of_mask() -> None:
    query, key = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4)
    causal = torch.ones(3, 3).tril().bool()
    assert torch.equal(hf.visible(None, query, key)[0, 0], causal)
    assert hf.visible(None, query, key, causal=False).all()
    assert hf.visible(None, query[:, :, :1], key).all()
    bias = torch.full((1, 1, 3, 3), -3.0)
    assert hf.visible(bias, query, key).all()
    for low in (-torch.inf, torch.finfo(torch.float32).min, 0.9 * torch.finfo(torch.float32).min):
        float_mask = torch.zeros(1, 1, 3, 3).masked_fill(~causal, low)
        assert torch.equal(hf.visible(float_mask, query, key)[0, 0], causal)
    with pytest.raises(LimitError, match=r"mask\.shape"):
        hf.visible(torch.ones(1, 3), query, key)
    with pytest.raises(LimitError, match="K=3"):
        hf.visible(torch.ones(1, 1, 3, 5, dtype=torch.bool), query, key)


def test_bad_arguments() -> None:
    model: Any = models.tiny("gemma3")
    before = settings(model)
    for layers in ([], [6], [-1], [True]):
        with pytest.raises(LimitError, match="layers"), hf.attached(model, "test-through", layers=layers):
            pass
    with pytest.raises(LimitError, match="full_attention"), hf.attached(model, "test-through", layers="full"):
        pass
    with pytest.raises(LimitError, match="test-through"), hf.attached(model, "test-thruogh"):
        pass
    assert settings(model) == before
    for name in ("sdpa", "eager", "my-flash", "a/b", ""):
        with pytest.raises(LimitError, match="name"):
            hf.register(name, through)
    with pytest.raises(LimitError, match="another function"):
        hf.register("test-through", zero)
    with pytest.raises(LimitError, match="one of bool"):
        hf.register("test-new", through, mask="booll")
    hf.register("test-through", through)  # the same pair again is fine


def test_importing_the_seam_loads_no_torch() -> None:
    code = "import sys, tokenmill.hf as hf; hf.__dir__(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
