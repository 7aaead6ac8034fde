from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPooling

import tokenmill.models as models
from tests.hf import vlms
from tokenmill import hf
from tokenmill.errors import LimitError

NEW = 10
PADDED = torch.ones(2, 26, dtype=torch.long)
PADDED[0, :6] = 0
# What generate adds for the callable itself; a decoder has its own use for them.
OWN = ("logits_processor", "stopping_criteria", "generation_config")


def loop(model: Any, input_ids: Tensor, inputs: hf.ModelInputs, *, chunk: int = 1, length: int | None = None) -> Tensor:
    """Greedy decoding by hand. With ``chunk`` > 1 each step feeds that many tokens again after a crop."""
    with torch.no_grad():
        out = model(**hf.prefill_inputs(model, input_ids, inputs, length=length))
        running = {**inputs.running, "past_key_values": out.past_key_values}
        text = torch.cat([input_ids, out.logits[:, -1:].argmax(-1)], dim=1)
        for step in range(NEW - 1):
            running = hf.grow(running)
            again = min(chunk, step + 1)
            if again > 1:
                running["past_key_values"].crop(1 - again)
            out = model(**hf.step_inputs(model, text, running, again))
            text = torch.cat([text, out.logits[:, -1:].argmax(-1)], dim=1)
    return text


def through_generate(seen: dict[str, Any] | None = None, chunk: int = 1) -> Any:
    def decode(model: Any, input_ids: Tensor, **kwargs: Any) -> Tensor:
        kwargs = {name: value for name, value in kwargs.items() if name not in OWN}
        inputs = hf.split_model_kwargs(model, kwargs)
        if seen is not None:
            seen.update(prefill=set(inputs.prefill), running=set(inputs.running))
        return loop(model, input_ids, inputs, chunk=chunk)

    return decode


def generate(model: Any, **kwargs: Any) -> Tensor:
    return model.generate(max_new_tokens=NEW, do_sample=False, **kwargs)


def batch(kind: str, attn: str = "sdpa") -> tuple[Any, dict[str, Any]]:
    """Two prompts with an image each; the first has six tokens of padding in front."""
    model, one = vlms.build(kind, attn)
    _, other = vlms.build(kind, attn)
    ids = torch.cat([torch.zeros(1, 6, dtype=torch.long), one["input_ids"]], dim=1)
    second = torch.cat([other["input_ids"], torch.tensor([[9, 8, 7, 6, 5, 4]])], dim=1)
    inputs: dict[str, Any] = {"input_ids": torch.cat([ids, second]), "attention_mask": PADDED.clone()}
    for name, value in one.items():
        if name in ("token_type_ids", "mm_token_type_ids"):
            inputs[name] = (inputs["input_ids"] == vlms.IMAGE).long()
        elif name != "input_ids":
            inputs[name] = torch.cat([value, value.flip(0) if name == "pixel_values" else value])
    return model, inputs


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", vlms.KINDS)
def test_a_loop_inside_generate_equals_generate(kind: str, attn: str) -> None:
    for model, inputs in (vlms.build(kind, attn), batch(kind, attn)):
        plain = generate(model, **inputs)
        assert len(set(plain[0, -NEW:].tolist())) > 1
        seen: dict[str, Any] = {}
        assert torch.equal(generate(model, **inputs, custom_generate=through_generate(seen)), plain)
        assert "mm_encoder_outputs" in seen["prefill"]
        assert {"position_ids", "past_key_values", "use_cache", "logits_to_keep"} <= seen["running"]
        assert ("attention_mask" in seen["running"]) == ("attention_mask" in inputs)


@pytest.mark.parametrize("kind", vlms.KINDS)
def test_a_loop_from_a_users_inputs_equals_generate(kind: str) -> None:
    for model, inputs in (vlms.build(kind), batch(kind)):
        plain = generate(model, **inputs)
        ids = inputs.pop("input_ids")
        split = hf.split_model_kwargs(model, {**inputs, "use_cache": True})
        assert "pixel_values" in split.prefill
        split = hf.with_positions(model, ids, split)
        assert torch.equal(loop(model, ids, split), plain)
        positions = split.running["position_ids"]
        assert hf.with_positions(model, ids, split) is split
        assert positions.shape == ((4, *ids.shape) if kind == "qwen2_5_vl" else ids.shape)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3"])
def test_text_models_with_padding_and_several_tokens_a_step(kind: str) -> None:
    model: Any = models.tiny(kind)
    ids = torch.randint(1, 64, (2, 26), generator=torch.Generator().manual_seed(4))
    plain = generate(model, input_ids=ids, attention_mask=PADDED)
    found = generate(model, input_ids=ids, attention_mask=PADDED, custom_generate=through_generate())
    assert torch.equal(found, plain)
    if kind != "gemma3":  # its sliding layers forget what a crop would bring back
        found = generate(model, input_ids=ids, attention_mask=PADDED, custom_generate=through_generate(chunk=3))
        assert torch.equal(found, plain)


def test_what_belongs_where() -> None:
    model, inputs = vlms.build("gemma3")
    features = BaseModelOutputWithPooling(pooler_output=torch.zeros(1, 4, 32))
    cache = DynamicCache(config=model.config)
    given = {
        "attention_mask": torch.ones(1, 20),
        "token_type_ids": inputs["token_type_ids"],
        "mm_encoder_outputs": {"image": features},
        "inputs_embeds": torch.zeros(1, 20, 32),
        "past_key_values": cache,
        "output_hidden_states": True,
        "logits_to_keep": 1,
        "pixel_values": None,
    }
    split = hf.split_model_kwargs(model, given)
    assert set(split.prefill) == {"mm_encoder_outputs", "inputs_embeds"}
    names = {"attention_mask", "token_type_ids", "past_key_values", "output_hidden_states", "logits_to_keep"}
    assert set(split.running) == names
    llava, _ = vlms.build("llava")
    split = hf.split_model_kwargs(llava, {"image_sizes": torch.ones(1, 2), "vision_feature_layer": -1})
    assert (set(split.prefill), set(split.running)) == ({"image_sizes"}, {"vision_feature_layer"})


def test_token_types_reach_the_prefill_only_where_the_model_wants_that() -> None:
    model, inputs = vlms.build("gemma3")
    ids = inputs.pop("input_ids")
    split = hf.split_model_kwargs(model, inputs)
    first = hf.prefill_inputs(model, ids, split)
    assert torch.equal(first["token_type_ids"], inputs["token_type_ids"])
    assert "pixel_values" in first
    step = hf.step_inputs(model, torch.cat([ids, ids[:, -1:]], dim=1), hf.grow(split.running), 1)
    assert "token_type_ids" not in step
    assert "pixel_values" not in step
    assert step["input_ids"].shape == (1, 1)


@pytest.mark.parametrize("rows", [(), (3,), (4,)])
def test_growing_equals_transformers(rows: tuple[int, ...]) -> None:
    model: Any = models.tiny("llama")
    positions = torch.arange(5).expand(2, 5) * 3
    running = {
        "attention_mask": torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]),
        "position_ids": positions.expand(*rows, 2, 5) if rows else positions,
        "token_type_ids": torch.tensor([[0, 1, 1, 0, 2], [0, 0, 0, 0, 1]]),
        "mm_token_type_ids": torch.tensor([[0, 1, 1, 0, 1], [0, 0, 0, 0, 0]]),
        "use_cache": True,
    }
    before = {name: value.clone() for name, value in running.items() if isinstance(value, Tensor)}
    for new in (0, 1):
        wanted = model._update_model_kwargs_for_generation({}, dict(running), num_new_tokens=1) if new else running
        found = hf.grow(running, new)
        assert found.keys() == wanted.keys()
        for name in before:
            assert torch.equal(found[name], wanted[name])
            assert found[name].dtype == running[name].dtype  # type: ignore[union-attr]
            assert torch.equal(running[name], before[name])  # type: ignore[arg-type]
    twice, once = hf.grow(hf.grow(running)), hf.grow(running, 2)
    assert all(torch.equal(twice[name], once[name]) for name in before)


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_a_prefill_that_continues_a_cache(whole: bool, mask: bool) -> None:
    model: Any = models.tiny("qwen2")
    ids = torch.randint(1, 64, (1, 30), generator=torch.Generator().manual_seed(8))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :9], past_key_values=cache)
    given: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
    if mask:
        given["attention_mask"] = torch.ones(1, 30)
    text = ids if whole else ids[:, 9:]
    length = None if mask or whole else 30
    split = hf.with_positions(model, text, hf.split_model_kwargs(model, given), length=length)
    made = hf.prefill_inputs(model, text, split, length=length)
    assert torch.equal(made["input_ids"], ids[:, 9:])
    assert made["position_ids"][0].tolist() == list(range(9, 30))
    found = loop(model, text, split, length=length)
    assert torch.equal(found[:, -NEW:], generate(model, input_ids=ids)[:, -NEW:])


def test_prompt_embeddings() -> None:
    model: Any = models.tiny("llama")
    ids = torch.randint(1, 64, (1, 12), generator=torch.Generator().manual_seed(8))
    embeds = model.get_input_embeddings()(ids).detach()
    split = hf.with_positions(model, ids, hf.split_model_kwargs(model, {"inputs_embeds": embeds, "use_cache": True}))
    made = hf.prefill_inputs(model, ids, split)
    assert "input_ids" not in made
    assert torch.equal(loop(model, ids, split), generate(model, input_ids=ids))


def test_bad_arguments() -> None:
    model: Any = models.tiny("llama")
    ids = torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(LimitError, match="attention_mask"):
        hf.split_model_kwargs(model, {"atention_mask": ids})
    with pytest.raises(LimitError, match="2-D"):
        hf.split_model_kwargs(model, {"attention_mask": torch.ones(1, 1, 4, 4)})
    with pytest.raises(LimitError, match=r"in \[1, T=4\]"):
        hf.step_inputs(model, ids, {}, 5)
    with pytest.raises(LimitError, match="at least 0"):
        hf.grow({}, -1)
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    split = hf.split_model_kwargs(model, {"past_key_values": cache})
    with pytest.raises(LimitError, match="more than the 4"):
        hf.prefill_inputs(model, ids, split, length=4)
