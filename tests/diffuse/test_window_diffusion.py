from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.diffuse import toys
from tokenmill.diffuse import (
    Denoiser,
    Diffusion,
    Quota,
    Threshold,
    WindowCache,
    WindowDiffusion,
    WindowRule,
    ranks,
    window_positions,
)
from tokenmill.errors import LimitError, UnsupportedError

IDS, PADDING = toys.prompts()
ONE = IDS[:1]


def window(external: int, internal: int, cycle: int, **settings: Any) -> WindowDiffusion:
    return WindowDiffusion(external_window=external, internal_window=internal, refresh_cycle=cycle, **settings)


def run(method: WindowDiffusion, model: Any, ids: Tensor = ONE, new: int = 20, **settings: Any) -> tuple[Tensor, Any]:
    decoder = method.decoder(**({"history": True} | settings))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return decoder.generate(model, ids, max_new_tokens=new), decoder.trace


@pytest.mark.prop("window-diffusion", 1)
@pytest.mark.parametrize("kind", toys.KINDS)
def test_a_cycle_of_one_over_the_whole_answer_is_the_plain_sampler(kind: str) -> None:
    model = toys.random_model(kind, layers=3)
    for steps in (None, 7):
        plain = Diffusion(Quota(None), steps=steps)
        wanted = plain.generate(model, IDS, attention_mask=PADDING, max_new_tokens=12)
        for far_field in (True, False):
            ours = window(12, 4, 1, steps=steps, far_field=far_field).decoder()
            found = ours.generate(model, IDS, attention_mask=PADDING, max_new_tokens=12)
            assert torch.equal(found, wanted)
            assert ours.trace.revealed == plain.trace.revealed
            assert ours.trace.positions == plain.trace.positions


@pytest.mark.prop("window-diffusion", 2)
def test_with_one_layer_a_window_over_everything_is_exact_for_any_cycle() -> None:
    model = toys.random_model(layers=1, seed=3)
    wanted = Diffusion(Quota(1)).generate(model, ONE, max_new_tokens=16)
    for cycle in (2, 5, 16):
        found, trace = run(window(16, 16, cycle), model, new=16)
        assert torch.equal(found, wanted)
        assert trace.refreshes == -(-16 // cycle)
    deep = toys.random_model("qwen2")
    wanted = Diffusion(Quota(1)).generate(deep, ONE, max_new_tokens=16)
    assert not torch.equal(run(window(16, 16, 16), deep, new=16)[0], wanted), "deeper context goes stale"


class Spy:
    """Keeps a policy's cache and, after each pass, which places its plan read and what the text was."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passes: list[dict[str, Any]] = []
        plain = Denoiser.logits

        def logits(denoiser: Denoiser, x: Tensor, **given: Any) -> Any:
            out = plain(denoiser, x, **given)
            self.passes.append({"x": x.clone(), "logits": out.logits, "targets": out.targets} | given)
            return out

        monkeypatch.setattr(Denoiser, "logits", logits)

    @property
    def decoding(self) -> list[dict[str, Any]]:
        """The passes of the decoder, without those that probe the model."""
        return [one for one in self.passes if one.get("positions") is not None]


@pytest.mark.prop("window-diffusion", 3)
def test_what_is_read_in_the_first_layer_is_always_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    for variant in ("llada", "dream"):
        model = toys.random_model("qwen2")
        spy = Spy(monkeypatch)
        states: list[tuple[Tensor, Tensor]] = []
        attention = model.model.layers[0].self_attn

        def keep(_m: Any, _a: Any, kwargs: dict[str, Any], _o: Any, states: Any = states) -> None:
            if kwargs["past_key_values"] is not None:  # a probe runs without
                layer = kwargs["past_key_values"].layers[0]
                states.append((layer.keys.clone(), layer.values.clone()))

        handle = attention.register_forward_hook(keep, with_kwargs=True)
        run(window(10, 3, 4, variant=variant), model)
        handle.remove()
        decoding = spy.decoding
        fresh_states: list[tuple[Tensor, Tensor]] = []
        handle = attention.register_forward_hook(
            lambda *a, f=fresh_states: f.append((a[2]["past_key_values"].layers[0].keys.clone(),
                                                a[2]["past_key_values"].layers[0].values.clone())),
            with_kwargs=True,
        )  # fmt: skip
        made = Denoiser(model, mask_token_id=toys.MASK)
        for one, kept in zip(decoding, states[-len(decoding) :], strict=True):
            fresh_states.clear()
            made.logits(one["x"], cache=made.new_cache(1, 29))
            seen = one["read"][0].nonzero()[:, 0]
            for ours, full in zip(kept, fresh_states[0], strict=True):
                torch.testing.assert_close(ours[:, :, seen], full[:, :, seen], atol=1e-5, rtol=1e-5)
        handle.remove()
        monkeypatch.undo()


@pytest.mark.prop("window-diffusion", 4)
@pytest.mark.prop("window-diffusion", 6)
@pytest.mark.parametrize("kind", toys.KINDS)
def test_a_pruned_sequence_is_the_full_one_with_the_far_field_hidden(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Positions stay absolute, so a pass over the window equals a pass over everything whose mask hides the rest."""
    model = toys.random_model(kind, layers=3)
    spy = Spy(monkeypatch)
    for external in (6, 12):
        spy.passes.clear()
        run(window(external, 3, 4, far_field=False), model)
        one = next(p for p in spy.decoding if p["compute"].sum() == 9 + external)
        x, seen = one["x"], one["compute"]
        made = Denoiser(model, mask_token_id=toys.MASK)
        places = torch.arange(x.shape[1])
        mask = seen[:, None, None, :].expand(-1, 1, x.shape[1], -1)
        if made.window is not None:
            near = mask & ((places[:, None] - places).abs() < made.window)
            mask = {"full_attention": mask, "sliding_attention": near}
        with torch.no_grad():
            full = model(x, attention_mask=mask, position_ids=places[None]).logits
        ours = one["logits"]
        torch.testing.assert_close(ours[..., : toys.MASK], full[:, seen[0], : toys.MASK], atol=1e-4, rtol=1e-4)
        assert one["positions"][0].tolist() == places.tolist()


@pytest.mark.prop("window-diffusion", 5)
def test_no_row_is_read_before_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenmill.hf import indexed

    monkeypatch.setattr(
        indexed, "_empty", lambda like, rows: like.new_full((*like.shape[:2], rows, like.shape[3]), torch.nan)
    )
    model = toys.random_model()
    clean = {}
    warnings.simplefilter("ignore", UserWarning)  # a window that is too small is part of the test
    for method in (
        window(10, 3, 4),
        window(10, 3, 4, far_field=False),
        window(4, 3, 9),
        window(10, 3, 4, variant="dream"),
        window(4, 3, 9, variant="dream", slide_window=False),
    ):
        decoder = method.decoder()
        clean[method] = decoder.generate(model, IDS, attention_mask=PADDING, max_new_tokens=20)
        assert not (clean[method] == toys.MASK).any()
    monkeypatch.undo()
    for method, wanted in clean.items():
        assert torch.equal(method.decoder().generate(model, IDS, attention_mask=PADDING, max_new_tokens=20), wanted)


@pytest.mark.prop("window-diffusion", 7)
@pytest.mark.parametrize("variant", ["llada", "dream"])
def test_reveals_stay_near_the_first_mask(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    internal, cycle = 3, 4
    spy = Spy(monkeypatch)
    for seed in range(3):
        spy.passes.clear()
        model = toys.random_model(seed=seed)
        # Without the far field a refresh reveals inside the window.
        _, trace = run(window(8, internal, cycle, variant=variant, far_field=False), model)
        old = torch.full((1, 20), toys.MASK)
        for step, new in enumerate(trace.history):
            changed = (old != new)[0].nonzero()[:, 0]
            assert (old[0, changed] == toys.MASK).all()
            first = int((old[0] == toys.MASK).nonzero()[0])
            refresh = step % cycle == 0
            order = ranks(old == toys.MASK)[0]
            if variant == "dream" and refresh:
                assert changed.tolist() == [first]
            elif variant == "dream":
                assert (order[changed] <= internal).all()
                # Revealed places stand within the span of the phase, first mask of the refresh to the last candidate.
                revealed = (new != toys.MASK)[0].nonzero()[:, 0]
                left = (new == toys.MASK)[0].nonzero()[:, 0]
                if len(left) and len(revealed):
                    assert int(revealed.max()) - int(left[0]) < internal + cycle
            else:
                assert (order[changed] <= (8 if refresh else internal)).all()
            old = new


@pytest.mark.prop("window-diffusion", 8)
@pytest.mark.parametrize(
    ("new", "external", "internal", "cycle"),
    [(20, 12, 4, 5), (17, 17, 3, 4), (24, 8, 8, 1), (9, 12, 5, 7), (20, 16, 1, 6)],
)
def test_passes_and_places_follow_the_formula(new: int, external: int, internal: int, cycle: int) -> None:
    model = toys.random_model()
    for far_field in (True, False):
        method = window(external, internal, cycle, far_field=far_field)
        decoder = Diffusion(LeftMost(), method.cache)
        decoder.generate(model, ONE, max_new_tokens=new)
        assert decoder.trace.model_calls == new
        wanted = window_positions(9, new, external, internal, cycle, far_field=far_field)
        assert decoder.trace.positions == wanted
    ours, trace = run(window(external, internal, cycle, steps=new), model, new=new)
    assert trace.model_calls == new
    halved, trace = run(window(new, max(internal, 4), cycle, steps=-(-new // 2)), model, new=new)
    assert trace.model_calls == -(-new // 2)
    assert ours.shape == halved.shape == (1, 9 + new)


class LeftMost(WindowRule):
    """Reveals the first candidate."""

    def reveal(self, proposal: Any) -> Any:
        from tokenmill.diffuse import top_n

        return top_n(-proposal.canvas.places.expand_as(proposal.eligible).float(), proposal.eligible, 1)


@pytest.mark.prop("window-diffusion", 8)
def test_the_dream_variant_takes_as_many_passes_as_steps() -> None:
    model = toys.random_model()
    for new, cycle in ((20, 6), (33, 9)):
        _, trace = run(window(new, new, cycle, variant="dream"), model, new=new)
        assert sum(trace.revealed) == new
        assert trace.model_calls <= new
        assert all(trace.revealed[i] == 1 for i in range(0, trace.model_calls, cycle))


@pytest.mark.prop("window-diffusion", 9)
def test_an_end_token_cuts_the_answer_behind_it() -> None:
    ids = ONE.clone()
    ids[0, 3] = toys.END  # in the prompt it stops nothing
    model = toys.random_model()
    head = model.lm_head

    def say_the_end(_m: Any, _i: Any, out: Tensor) -> Tensor:
        out[..., toys.END] = -60.0
        out[:, -2:-1, toys.END] = 60.0
        return out

    # The last token but one of a pass says the end: far out at a refresh, near by in between. (The probes come first.)
    run(window(8, 3, 4), model, new=1)
    head.register_forward_hook(say_the_end)
    for variant in ("dream", "llada"):
        method = window(8, 3, 4, variant=variant, early_stop=True, far_field=False)
        out, trace = run(method, model, ids, eot_id=toys.END)
        answer = out[0, 9:].tolist()
        assert answer.count(toys.END) == 1
        assert answer[-1] == toys.END
        assert len(answer) == trace.lengths[0] < 20
        assert not (out == toys.MASK).any()
        ended = next(i for i, one in enumerate(trace.history) if (one == toys.END).any())
        assert trace.refreshes >= trace.model_calls - ended - 1, "behind the end, each pass renews the cache"
        assert all(n == 1 for n in trace.revealed)
        if variant == "dream":  # what is left is filled from the left
            for before, after in zip(trace.history[ended:-1], trace.history[ended + 1 :], strict=True):
                assert int((before != after)[0].nonzero()[0]) == int((before == toys.MASK)[0].nonzero()[0])
    whole, _ = run(window(8, 3, 4, variant="dream"), model, ids, eot_id=toys.END)
    assert whole.shape[1] == 29


@pytest.mark.prop("window-diffusion", 10)
def test_with_an_inner_window_of_one_the_shifted_variant_goes_from_left_to_right() -> None:
    for kind, cycle in (("llama", 1), ("qwen2", 5)):
        model = toys.random_model(kind)
        out, trace = run(window(16, 1, cycle, variant="dream", alg="entropy", early_stop=True), model, new=14)
        assert trace.model_calls == 14
        for step, answer in enumerate(trace.history, start=1):
            assert (answer[0] != toys.MASK).tolist() == [True] * step + [False] * (14 - step)
        if cycle == 1:  # a refresh at each pass: the argmax at the place before, over the window
            made = Denoiser(model, mask_token_id=toys.MASK)
            for step in range(14):
                x = out.clone()
                x[0, 9 + step :] = toys.MASK
                logits = made.logits(x[:, : 9 + step + 16]).logits
                assert int(logits[0, 8 + step].argmax()) == int(out[0, 9 + step])


@pytest.mark.prop("window-diffusion", 11)
def test_the_cache_holds_key_heads_only() -> None:
    for kind, heads in (("qwen2", 2), ("gemma3", 1), ("llama", 4)):
        model, shapes = toys.random_model(kind, layers=2), []

        def keep(_m: Any, _a: Any, kwargs: dict[str, Any], _o: Any, shapes: Any = shapes) -> None:
            if kwargs["past_key_values"] is not None:
                shapes.append(kwargs["past_key_values"].layers[0].keys.shape)

        model.model.layers[0].self_attn.register_forward_hook(keep, with_kwargs=True)
        run(window(8, 3, 4), model)
        assert {shape[1] for shape in shapes} == {heads}
        assert max(shape[2] for shape in shapes) == 29


def test_text_behind_the_masks_and_revealed_far_tokens_are_context() -> None:
    """Sets of places, not prefixes: tokens to the right of the window are read."""
    model = toys.random_model()
    ids = torch.cat([ONE, torch.full((1, 12), toys.MASK), IDS[1:2]], dim=1)
    for far_field in (False, True):
        method = window(6, 2, 3, far_field=far_field)
        decoder = method.decoder(infill=True)
        out = decoder.generate(model, ids, max_new_tokens=0)
        assert torch.equal(out[:, 21:], IDS[1:2])
        assert not (out == toys.MASK).any()
        assert decoder.trace.positions < decoder.trace.model_calls * 30
        decoder.generate(model, ids[:, :-2], max_new_tokens=0)
    other = ids.clone()
    other[0, -1] = (other[0, -1] + 3) % 28 + 2
    assert not torch.equal(
        window(6, 2, 3).decoder(infill=True).generate(model, other, max_new_tokens=0)[:, :21], out[:, :21]
    )


def test_a_window_that_does_not_slide_starts_a_phase_when_it_is_full() -> None:
    model = toys.random_model()
    still = window(20, 3, 9, slide_window=False)
    out, trace = run(still, model)
    assert out.shape == (1, 29)
    assert trace.model_calls == 20
    slides = run(window(20, 3, 9), model)[1]
    assert trace.refreshes > slides.refreshes
    for before, after in zip(trace.history[:3], trace.history[1:4], strict=True):
        assert int((before != after)[0].nonzero()[0]) <= 4


def test_the_algorithms_score_by_their_names() -> None:
    model = toys.random_model("qwen2")
    outs = {alg: run(window(20, 20, 3, alg=alg), model)[0] for alg in ("entropy", "topk_margin", "low_confidence")}
    assert torch.equal(outs["low_confidence"], run(window(20, 20, 3, alg="maskgit_plus"), model)[0])
    firsts = {}
    from tokenmill.diffuse import Entropy, Margin

    for alg, rule in (("entropy", Entropy(1)), ("topk_margin", Margin(1)), ("low_confidence", Quota(1))):
        plain = Diffusion(rule, WindowCache(external=20, internal=20, refresh=3, far_field=True))
        firsts[alg] = plain.generate(model, ONE, max_new_tokens=20)
        assert torch.equal(firsts[alg], outs[alg])
    assert len({tuple(o[0].tolist()) for o in outs.values()}) == 3


def test_other_rules_run_in_the_window_and_other_policies_under_its_rule() -> None:
    model = toys.random_model()
    method = window(10, 4, 5)
    fast = Diffusion(Threshold(0.3), method.cache)
    fast.generate(model, IDS, attention_mask=PADDING, max_new_tokens=20)
    assert fast.trace.tokens == 60
    assert fast.trace.model_calls < 20
    plain = Diffusion(method.rule, steps=20)
    out = plain.generate(model, IDS, attention_mask=PADDING, max_new_tokens=20)
    assert torch.equal(out, Diffusion(Quota(1)).generate(model, IDS, attention_mask=PADDING, max_new_tokens=20))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"refresh_cycle": 0}, "refresh_cycle = 0"),
        ({"internal_window": 0}, "internal_window = 0"),
        ({"external_window": True}, "external_window = True"),
        (
            {"external_window": 8, "internal_window": 9},
            "internal_window = 9, but it must be at most external_window = 8",
        ),
        ({"variant": "mercury"}, "variant"),
        ({"alg": "luck"}, "alg"),
        ({"steps": 0}, "steps"),
        ({"top_p": 2.0}, "top_p"),
    ],
)
def test_bad_settings_are_refused_by_name(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(LimitError, match=text):
        WindowDiffusion(**settings)


def test_a_window_smaller_than_a_phase_is_warned_about_and_read_all_the_same() -> None:
    decoder = window(6, 3, 8).decoder()
    model = toys.random_model(layers=1)
    with pytest.warns(UserWarning, match=r"external = 6 is less than internal \+ refresh = 11"):
        out = decoder.generate(model, ONE, max_new_tokens=20)
    assert decoder.trace.model_calls == 20
    assert not (out == toys.MASK).any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoder.generate(model, ONE, max_new_tokens=6)
        window(11, 3, 8).decoder().generate(model, ONE, max_new_tokens=20)
    with pytest.raises(UnsupportedError, match="guidance"):
        WindowDiffusion(cfg_scale=1.5)
    with pytest.raises(LimitError, match="alg"):
        WindowRule(alg="luck")  # type: ignore[arg-type]
