"""The adapter: every method on every class, before the decoder and inside it, against the masked full-length run."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from tokenmill import prune
from tokenmill.errors import LimitError, UnsupportedError
from tokenmill.hf.vision import encode, visual_mask
from tokenmill.laws.general import fingerprint
from tokenmill.prune.information_horizon import InformationHorizon, PruneSchedule
from tokenmill.prune.vflowopt import VFlowOpt, VFlowParams

from . import methods, oracle, vlms

METHODS = methods.cases()
NEUTRAL: dict[str, Any] = {
    "divprune": prune.DivPrune(keep=1.0),
    "divprune compact": prune.DivPrune(keep=1.0, positions="compact"),
    "idpruner": prune.IDPruner(keep=1.0, importance="norm"),
    "zoo-prune": prune.ZOOPrune(keep=1.0),
    "entropyprune": prune.EntropyPrune(keep=1.0, layer=1),
    "information-horizon": InformationHorizon(keep=1.0, layer=2, ratio=1.0),
    "information-horizon empty": InformationHorizon(schedule=PruneSchedule(())),
    "todre": prune.ToDRE(keep=1.0, tau=0.0),
    "vflowopt": VFlowOpt(keep=1.0, params=VFlowParams(r0=1.0, r1=1.0, r2=1.0)),
    "token-correlation-compression": prune.TokenCorrelationCompressor(alpha=1.0),
    "attention": prune.AttentionTopK(keep=1.0),
}


@cache
def model_of(kind: str, attn: str = "sdpa") -> Any:
    return vlms.model(kind, attn)


@pytest.mark.prop("divprune", 9)
@pytest.mark.prop("divprune", 11)
@pytest.mark.prop("idpruner", 11)
@pytest.mark.prop("zoo-prune", 10)
@pytest.mark.prop("entropyprune", 8)
@pytest.mark.prop("information-horizon", 2)
@pytest.mark.prop("information-horizon", 3)
@pytest.mark.prop("todre", 12)
@pytest.mark.prop("todre", 13)
@pytest.mark.prop("vflowopt", 11)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", vlms.KINDS)
@pytest.mark.parametrize("name", METHODS)
def test_pruned_run_equals_the_masked_full_length_run(name: str, kind: str, attn: str) -> None:
    """Prefill and ten cached steps of three left-padded rows with one or two pictures."""
    model, inputs = model_of(kind, attn), vlms.inputs(kind)
    done = oracle.run(METHODS[name], model, inputs)
    assert done.error < 1e-5
    last = max(done.dropped)
    assert done.dropped[last].any(), "nothing was dropped, so nothing was tested"
    # The comparison would notice: with every token visible the logits are others.
    plain = oracle.masked_logits(model, inputs, done.sequences[:, -oracle.STEPS :], {})[:, -oracle.STEPS - 1 : -1]
    assert float((done.got - plain).abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["divprune", "todre", "entropyprune", "information-horizon"])
def test_videos_of_qwen(name: str) -> None:
    model, inputs = model_of("qwen2_5_vl"), vlms.inputs("qwen2_5_vl", video=True)
    done = oracle.run(METHODS[name], model, inputs)
    assert done.error < 1e-5
    gone = done.dropped[max(done.dropped)]
    assert (gone & (inputs["input_ids"] == vlms.VIDEO)).any()


@pytest.mark.prop("divprune", 10)
@pytest.mark.prop("entropyprune", 7)
@pytest.mark.prop("information-horizon", 1)
@pytest.mark.prop("todre", 1)
@pytest.mark.prop("vflowopt", 1)
@pytest.mark.prop("token-correlation-compression", 12)
@pytest.mark.parametrize("kind", vlms.KINDS)
@pytest.mark.parametrize("name", NEUTRAL)
def test_keeping_everything_is_the_untouched_model_bit_for_bit(name: str, kind: str) -> None:
    model, inputs, method = model_of(kind), vlms.inputs(kind), NEUTRAL[name]
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [vlms.IMAGE, vlms.VIDEO]}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        plain = model.generate(**inputs, **settings)
        ours = method.generate(model, inputs, **settings)
    assert torch.equal(plain.sequences, ours.sequences)
    assert torch.equal(torch.stack(plain.logits), torch.stack(ours.logits))


@pytest.mark.parametrize("kind", vlms.KINDS)
@pytest.mark.parametrize("name", ["divprune", "todre some rows", "attention"])
def test_plain_forward_without_a_cache(name: str, kind: str) -> None:
    model, inputs, method = model_of(kind), vlms.inputs(kind), METHODS[name]
    with torch.no_grad():
        pruned = method.prepare(model, inputs)
        with method.attach(model, pruned) as trace:
            logits = model(**pruned, use_cache=False).logits
    dropped = oracle.dropped_columns(pruned, trace, model, inputs)
    none = torch.zeros(3, 0, dtype=torch.long)
    want = oracle.masked_logits(model, inputs, none, dropped)
    for row in range(3):
        gone = dropped[max(dropped)][row] if trace.shortening.kept else dropped[0][row]
        kept = inputs["attention_mask"][row].bool() & ~gone
        assert torch.allclose(logits[row, -int(kept.sum()) :], want[row, kept], atol=1e-5)


@pytest.mark.parametrize("kind", vlms.KINDS)
@pytest.mark.parametrize("name", ["divprune", "entropyprune", "todre some rows"])
def test_a_second_turn_reads_the_pruned_cache(name: str, kind: str) -> None:
    model, inputs, method = model_of(kind), vlms.inputs(kind), METHODS[name]
    settings: dict[str, Any] = {"do_sample": False, "suppress_tokens": [vlms.IMAGE, vlms.VIDEO]}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    turn = torch.tensor([[5, 6, 7], [8, 9, 10], [11, 12, 13]])
    with torch.no_grad():
        pruned = method.prepare(model, inputs)
        with method.attach(model, pruned) as trace:
            first = model.generate(**pruned, max_new_tokens=3, **settings)
            whole = torch.cat([first.sequences, turn], 1)
            dropped = oracle.dropped_columns(pruned, trace, model, inputs)
            second = model.generate(
                **pruned.extend(whole), past_key_values=first.past_key_values, max_new_tokens=4, **settings
            )
    start = pruned["input_ids"].shape[1]
    want = oracle.masked_logits(model, inputs, second.sequences[:, start:], dropped)[:, -5:-1]
    assert torch.allclose(torch.stack(second.logits, 1), want, atol=1e-5)


@pytest.mark.prop("information-horizon", 4)
@pytest.mark.parametrize("kind", [k for k in vlms.KINDS if k != "qwen2_5_vl"])
def test_compact_positions_inside_renumber_from_the_stage_on(kind: str) -> None:
    """One row without padding: layers from the stage on are run by hand on the shortened row with positions 0, 1, 2."""
    from tokenmill.hf.layout import decoder

    model = model_of(kind)
    inputs = vlms.inputs(kind, rows=1)
    stages = PruneSchedule(((2, 0.5, "divprune"),))
    runs = {}
    for positions in ("keep", "compact"):
        method = InformationHorizon(schedule=stages, positions_inside=positions)
        with torch.no_grad(), method.attach(model) as trace:
            runs[positions] = model(**inputs, use_cache=False).logits
    assert not torch.allclose(runs["keep"], runs["compact"], atol=1e-3)
    text, found = decoder(model), []
    handle = text.layers[2].register_forward_pre_hook(lambda _m, args: found.append(args[0]))
    with torch.no_grad():
        model(**inputs, use_cache=False)
    handle.remove()
    kept = trace.shortening.kept[2][0] | ~visual_mask(model, inputs["input_ids"])[0]
    hidden = found[0][:, kept]
    phases = text.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
    with torch.no_grad():
        for layer in text.layers[2:]:
            hidden = layer(hidden, attention_mask=None, position_embeddings=phases)
        want = model.lm_head(text.norm(hidden))
    assert torch.allclose(runs["compact"], want, atol=1e-5)


def test_compact_positions_in_decoding_go_on_without_a_gap() -> None:
    model, inputs = model_of("llava"), vlms.inputs("llava")
    method = InformationHorizon(schedule=PruneSchedule(((2, 0.5, "divprune"),)), positions_inside="compact")
    settings: dict[str, Any] = {"do_sample": False, "suppress_tokens": [vlms.IMAGE], "return_dict_in_generate": True}
    with torch.no_grad(), method.attach(model):
        out = model.generate(**inputs, max_new_tokens=5, output_logits=True, **settings)
        longer = {
            "input_ids": out.sequences[:, :-1],
            "attention_mask": torch.cat([inputs["attention_mask"], torch.ones(3, 4, dtype=torch.long)], 1),
            "pixel_values": inputs["pixel_values"],
        }
        # The same draws and the same drops for a prompt that is longer by text: recomputed without a cache.
        again = model(**longer, use_cache=False).logits[:, -5:]
    assert torch.allclose(torch.stack(out.logits, 1), again, atol=1e-5)


def test_compact_positions_before_the_decoder() -> None:
    model, inputs = model_of("llava"), vlms.inputs("llava")
    pruned = prune.DivPrune(keep=0.3, positions="compact").prepare(model, inputs)
    for positions, mask in zip(pruned["position_ids"], pruned["attention_mask"], strict=True):
        assert positions[mask.bool()].tolist() == list(range(int(mask.sum())))


def test_compact_positions_of_mrope_keep_rows_and_columns_apart() -> None:
    from tokenmill.prune._positions import compact_positions

    # Two words, a picture of 3 x 4 of which four tokens are left, two words; the picture begins at position 2.
    height, width = torch.tensor([2, 2, 4, 4]), torch.tensor([2, 5, 2, 5])
    picture = torch.stack([torch.full((4,), 2), height, width])
    text = torch.arange(2).expand(3, -1)
    given = torch.cat([text, picture, torch.tensor([6, 7]).expand(3, -1)], 1)[:, None]
    visual = torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0]], dtype=torch.bool)
    made = compact_positions(given, visual, torch.ones_like(visual))
    assert made[:, 0, :2].tolist() == [[0, 1]] * 3
    assert made[1:, 0, 2:6].tolist() == [[2, 2, 3, 3], [2, 3, 2, 3]]
    assert made[:, 0, 6:].tolist() == [[4, 5]] * 3


@pytest.mark.parametrize("kind", vlms.KINDS)
def test_rows_of_a_batch_are_what_they_are_alone(kind: str) -> None:
    model = model_of(kind)
    inputs = vlms.inputs(kind, rows=1, images=(1,))
    both = {k: torch.cat([v, v]) for k, v in inputs.items()}
    for method in (METHODS["divprune"], METHODS["zoo-prune"], METHODS["token-correlation-compression"]):
        with torch.no_grad():
            alone, pair = method.prepare(model, inputs), method.prepare(model, both)
        assert torch.equal(pair["input_ids"][1:], alone["input_ids"])
        assert torch.equal(pair.report[1].keep, alone.report[0].keep)


@pytest.mark.parametrize("kind", vlms.KINDS)
def test_kept_features_are_the_encoders_own_and_raster_order_stays(kind: str) -> None:
    model, inputs = model_of(kind), vlms.inputs(kind)
    with torch.no_grad():
        pruned = METHODS["divprune"].prepare(model, inputs)
        visuals = encode("test", model, inputs).visuals
    given = pruned["mm_encoder_outputs"]["image"].pooler_output
    flat = given if isinstance(given, torch.Tensor) else torch.cat(list(given))
    assert torch.equal(flat, torch.cat([v.features[r.keep] for v, r in zip(visuals, pruned.report, strict=True)]))
    assert all((r.keep.diff() > 0).all() for r in pruned.report)


@pytest.mark.prop("zoo-prune", 11)
@pytest.mark.parametrize("kind", ["llava", "llava_next", "llava_onevision", "internvl", "qwen2_5_vl"])
def test_projector_inputs_line_up_with_the_features(kind: str) -> None:
    """Projecting what was captured, in token order, gives the features; newlines are the newline embedding."""
    from tokenmill.hf.tower import projector

    model, inputs = model_of(kind), vlms.inputs(kind)
    with torch.no_grad():
        for visual in encode("test", model, inputs, with_projector_input=True).visuals:
            assert visual.before is not None
            rows = visual.before.flatten(0, 1) if kind == "qwen2_5_vl" else visual.before[:, 0]
            again = projector(model)(rows)
            real = ~visual.newline
            assert torch.allclose(again[real], visual.features[real], atol=1e-6)
            if visual.newline.any():
                assert (visual.features[visual.newline] == model.model.image_newline).all()


def test_places_of_tiles_follow_rows_and_newlines() -> None:
    model, inputs = model_of("llava_next"), vlms.inputs("llava_next", rows=1)
    with torch.no_grad():
        (visual,) = encode("test", model, inputs).visuals
    assert visual.place[:16, 0].tolist() == [0] * 16
    assert visual.place[15].tolist() == [0, 3, 3]
    assert visual.place[16].tolist() == [1, 0, 0]
    assert visual.place[-1].tolist() == [1, 5, 8]
    assert visual.newline.nonzero()[:, 0].tolist() == [16 + 9 * r + 8 for r in range(6)]


@pytest.mark.parametrize("name", METHODS)
def test_model_is_left_as_it_was(name: str) -> None:
    model, inputs, method = model_of("llava"), vlms.inputs("llava"), METHODS[name]
    before = fingerprint(model)
    with torch.no_grad():
        pruned = method.prepare(model, inputs)
        with method.attach(model, pruned):
            model(**pruned)
        with pytest.raises(RuntimeError, match="stop"), method.attach(model, pruned):
            raise RuntimeError("stop")
    after = fingerprint(model)
    assert before.keys() == after.keys()
    for key, was in before.items():
        now = after[key]
        assert torch.equal(was[2], now[2]) if key.startswith("tensor") else was == now, key


def test_lengths_of_the_cache_differ_by_layer() -> None:
    model, inputs = model_of("llava"), vlms.inputs("llava", rows=1)
    method = InformationHorizon(schedule=PruneSchedule(((1, 8, "random"), (3, 0, "drop_all"))))
    with torch.no_grad(), method.attach(model) as trace:
        out = model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    length = inputs["input_ids"].shape[1]
    held = [layer.keys.shape[2] for layer in out.past_key_values.layers]
    assert held == [length + 2, length - 8 + 2, length - 8 + 2, length - 16 + 2]
    assert trace.shortening.lengths == [length, length - 8, length - 8, length - 16]
    assert trace.model_calls == 3
    assert trace.positions == length + 2
    assert trace.flops == prune.prefill_flops(model, trace.shortening.lengths)


def test_beams_share_what_their_prompt_keeps() -> None:
    model, inputs = model_of("llava"), vlms.inputs("llava", rows=1)
    method = METHODS["entropyprune"]
    with torch.no_grad():
        beams = method.generate(model, inputs, max_new_tokens=4, num_beams=3, suppress_tokens=[vlms.IMAGE])
        pruned = METHODS["divprune"].generate(
            model, inputs, max_new_tokens=4, num_beams=3, suppress_tokens=[vlms.IMAGE]
        )
    assert beams.shape[1] == inputs["input_ids"].shape[1] + 4
    assert len(pruned) == 1


def test_dtype_of_the_model_stays() -> None:
    model = vlms.model("llava").to(torch.bfloat16)
    inputs = vlms.inputs("llava")
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    for name in ("divprune", "zoo-prune", "entropyprune", "todre", "vflowopt", "token-correlation-compression"):
        with torch.no_grad():
            pruned = METHODS[name].prepare(model, inputs)
            with METHODS[name].attach(model, pruned):
                logits = model(**pruned).logits
        assert logits.dtype == torch.bfloat16
        assert torch.isfinite(logits).all()


# -- bad input ---------------------------------------------------------------------------------------------------


def refuses(method: Any, model: Any, inputs: Any, *parts: str, error: type[Exception] = LimitError) -> None:
    ran = []
    handle = model.model.language_model.register_forward_pre_hook(lambda *_: ran.append(1))
    try:
        with pytest.raises(error) as caught:
            method.generate(model, inputs, max_new_tokens=1)
    finally:
        handle.remove()
    assert not ran, "the decoder ran before the error"
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("kind", vlms.KINDS)
@pytest.mark.parametrize("name", ["divprune", "entropyprune"])
def test_text_only_is_refused(name: str, kind: str) -> None:
    inputs = {"input_ids": torch.randint(1, 50, (1, 6)), "attention_mask": torch.ones(1, 6, dtype=torch.long)}
    refuses(METHODS[name], model_of(kind), inputs, "0 placeholders", "text-only")


@pytest.mark.parametrize("kind", vlms.KINDS)
def test_missing_and_surplus_placeholders_are_refused_with_both_numbers(kind: str) -> None:
    model, inputs = model_of(kind), vlms.inputs(kind, rows=1, images=(1,))
    count = int((inputs["input_ids"] == vlms.IMAGE).sum())
    fewer = {**inputs, "input_ids": inputs["input_ids"].clone()}
    fewer["input_ids"][0, (fewer["input_ids"][0] == vlms.IMAGE).nonzero()[0]] = 5
    if "mm_token_type_ids" in fewer:
        fewer["mm_token_type_ids"] = (fewer["input_ids"] == vlms.IMAGE).int()
    refuses(METHODS["divprune"], model, fewer, str(count - 1), str(count))
    none = {**inputs, "input_ids": torch.where(inputs["input_ids"] == vlms.IMAGE, 5, inputs["input_ids"])}
    refuses(METHODS["divprune"], model, none, "0 image placeholders", str(count))


def test_grids_with_pruned_ids_are_refused() -> None:
    model, inputs = model_of("qwen2_5_vl"), vlms.inputs("qwen2_5_vl", rows=1)
    pruned = METHODS["divprune"].prepare(model, inputs)
    again = {**inputs, **{k: pruned[k] for k in ("input_ids", "attention_mask", "mm_token_type_ids")}}
    refuses(METHODS["divprune"], model, again, "5 image placeholders", "16")
    refuses(METHODS["divprune"], model, pruned, "mm_encoder_outputs")


def test_features_that_are_not_finite_are_refused() -> None:
    model = vlms.model("llava")
    inputs = vlms.inputs("llava")
    inputs["pixel_values"][0, 0, 0, 0] = torch.nan
    refuses(METHODS["divprune"], model, inputs, "NaN")


@pytest.mark.parametrize("bad", [0, -1, True, 0.0, 1.5, float("nan"), "0.5", None])
@pytest.mark.parametrize("method", [prune.DivPrune, prune.ZOOPrune, prune.ToDRE, prune.EntropyPrune, prune.IDPruner])
def test_bad_budgets_are_refused(method: Any, bad: Any) -> None:
    with pytest.raises(LimitError, match="keep"):
        method(keep=bad)


def test_a_count_above_the_tokens_is_clamped_and_reported() -> None:
    model, inputs = model_of("llava"), vlms.inputs("llava", rows=1)
    pruned = prune.DivPrune(keep=99).prepare(model, inputs)
    assert [(r.tokens, len(r.keep), r.asked) for r in pruned.report] == [(16, 16, 99)]


@pytest.mark.parametrize("cache", ["static", "offloaded"])
def test_caches_that_cannot_have_layers_of_several_lengths_are_refused(cache: str) -> None:
    model, inputs = model_of("llava"), vlms.inputs("llava", rows=1)
    with pytest.raises(UnsupportedError, match=r"layers of several lengths in .*Cache"):
        METHODS["entropyprune"].generate(model, inputs, max_new_tokens=2, cache_implementation=cache)


def test_quantised_caches_are_refused_with_stages_inside() -> None:
    model, inputs = model_of("llava"), vlms.inputs("llava", rows=1)
    odd = DynamicCache(config=model.config.get_text_config())
    odd.layers[:] = [type("QuantizedLayer", (DynamicLayer,), {})() for _ in odd.layers]
    with pytest.raises(UnsupportedError, match=r"several lengths in DynamicCache \(QuantizedLayer\)"):
        METHODS["entropyprune"].generate(model, inputs, max_new_tokens=2, past_key_values=odd)


def test_prefill_in_chunks_is_refused() -> None:
    model, inputs = model_of("llava"), vlms.inputs("llava", rows=1)
    with pytest.raises((UnsupportedError, ValueError), match="chunk"):
        METHODS["entropyprune"].generate(model, inputs, max_new_tokens=2, prefill_chunk_size=8)


def test_a_class_token_that_is_not_there_is_refused() -> None:
    for kind in ("llava_onevision", "qwen2_5_vl"):
        model, inputs = model_of(kind), vlms.inputs(kind)
        for method in (
            prune.ToDRE(pivot="cls"),
            prune.IDPruner(importance="cls_attention"),
            prune.TokenCorrelationCompressor(cls="token"),
        ):
            refuses(method, model, inputs, "class token", error=UnsupportedError)


@pytest.mark.parametrize("method", [prune.EntropyPrune(layer=4), prune.AttentionTopK(layer=5)])
def test_layers_that_are_not_there_are_refused(method: Any) -> None:
    refuses(method, model_of("llava"), vlms.inputs("llava"), "layer", "4")


def test_other_models_are_refused() -> None:
    import tokenmill as tm

    with pytest.raises(UnsupportedError, match="LlamaForCausalLM"):
        prune.DivPrune().prepare(tm.models.tiny("llama"), {"input_ids": torch.ones(1, 3, dtype=torch.long)})


def test_pictures_of_one_patch_stay() -> None:
    model = model_of("qwen2_5_vl")
    ids = torch.tensor([[1, vlms.START, vlms.IMAGE, vlms.END, 2, 3]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(4, 96),
        "image_grid_thw": torch.tensor([[1, 2, 2]]),
        "mm_token_type_ids": (ids == vlms.IMAGE).int(),
    }
    for name in ("divprune", "idpruner", "zoo-prune", "todre", "entropyprune", "token-correlation-compression"):
        with torch.no_grad():
            out = METHODS[name].generate(model, inputs, max_new_tokens=2)
        assert out.shape == (1, 8), name
