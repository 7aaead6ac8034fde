from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.diffuse import toys
from tokenmill import models
from tokenmill.diffuse import (
    Acceptance,
    Denoiser,
    Diffusion,
    Entropy,
    FreeCache,
    GuidedRule,
    NoCache,
    Quota,
    Threshold,
    WindowCache,
    accepts,
    frozen_prefix,
    token_map_of,
)
from tokenmill.diffuse._canvas import Canvas
from tokenmill.diffuse._judge import Judge, check_map
from tokenmill.diffuse._trace import DiffusionTrace
from tokenmill.errors import LimitError, NonFiniteError

IDS, PADDING = toys.prompts()
ONE = IDS[:1]
NEW = 14
NEVER: dict[str, Any] = {"acceptance": "threshold", "threshold": 1.0}
ALWAYS: dict[str, Any] = {"acceptance": "topk", "top_k": toys.VOCAB}


def guide(seed: int = 3, kind: str = "llama") -> Any:
    return models.tiny(kind, vocab=toys.VOCAB, seed=seed)


def run(model: Any, rule: Any, policy: Any = None, ids: Tensor = IDS, new: int = NEW, **settings: Any) -> Any:
    mask = PADDING if ids is IDS else None
    decoder = Diffusion(rule, policy, **({"seed": 0, "history": True} | settings))
    return decoder.generate(model, ids, attention_mask=mask, max_new_tokens=new), decoder.trace


# The cache


@pytest.mark.prop("freecache-guided-diffusion", 1)
@pytest.mark.parametrize("policy", ["block", "aggressive", "sliding"])
def test_nothing_frozen_is_no_cache(policy: Any) -> None:
    for kind in ("qwen2", "gemma3"):
        model = toys.random_model(kind, layers=3)
        wanted, plain = run(model, Threshold(0.3))
        found, trace = run(model, Threshold(0.3), FreeCache(policy=policy, window=40, freeze="never"))
        assert torch.equal(found, wanted)
        assert trace.positions == plain.positions


@pytest.mark.prop("freecache-guided-diffusion", 2)
@pytest.mark.parametrize("shift", [False, True])
def test_delayed_freezing_is_exact_on_one_layer_and_the_official_one_is_not(shift: bool) -> None:
    model = toys.random_model(layers=1, seed=2)
    guided = GuidedRule(guide(), **ALWAYS | {"top_k": 14})
    changed = []
    for rule in (Quota(1), Threshold(0.25), guided):
        wanted, plain = run(model, rule, logits_shift=shift, block_length=4)
        for policy in (
            FreeCache(block_size=4),
            FreeCache(block_size=3),
            FreeCache(policy="aggressive"),
            FreeCache(policy="sliding", window=40),
        ):
            found, trace = run(model, rule, policy, logits_shift=shift, block_length=4)
            assert torch.equal(found, wanted), policy
            assert policy.policy == "sliding" or trace.positions < plain.positions
        official, _ = run(model, rule, FreeCache(block_size=4, freeze="official"), logits_shift=shift, block_length=4)
        changed.append(not torch.equal(official, wanted))
    assert any(changed)


@pytest.mark.prop("freecache-guided-diffusion", 2)
def test_official_freezing_keeps_the_last_tokens_of_a_block_as_masks() -> None:
    """Keys of one layer: where the two ways differ are exactly the tokens of each block's last pass."""
    model = toys.random_model(layers=1)
    kept: dict[str, Tensor] = {}
    last: list[int] = []
    for freeze in ("delayed", "official"):
        states: list[Tensor] = []

        def keep(_m: Any, _a: Any, kwargs: dict[str, Any], _o: Any, states: Any = states) -> None:
            if kwargs["past_key_values"] is not None:
                states.append(kwargs["past_key_values"].layers[0].keys.clone())

        handle = model.model.layers[0].self_attn.register_forward_hook(keep, with_kwargs=True)
        # The order is that of an entropy rule with one token a pass; reveals are not a prefix.
        _, trace = run(
            model,
            Entropy(1),
            FreeCache(block_size=4, freeze=freeze),
            ONE,
            12,
            block_length=4,  # type: ignore[arg-type]
        )
        handle.remove()
        kept[freeze] = states[-4]  # the first pass of the last block
        if freeze == "official":
            text = [torch.full((1, 12), toys.MASK), *trace.history]
            for block in (3, 7):
                last.append(9 + int((text[block] != text[block + 1])[0].nonzero()[0]))
    differ = ((kept["delayed"] - kept["official"]).abs().amax((0, 1, 3)) > 1e-5).nonzero()[:, 0].tolist()
    # Tokens in front of the last block; what is fed in this pass is the same in both, if the text is.
    assert [place for place in differ if place < 17] == sorted(last)


@pytest.mark.prop("freecache-guided-diffusion", 3)
@pytest.mark.parametrize("policy", ["block", "aggressive", "sliding"])
def test_a_frozen_prefix_is_exact_for_a_causal_model(policy: Any) -> None:
    for kind in toys.KINDS:
        model: Any = models.tiny(kind, vocab=toys.VOCAB, layers=3)
        settings: dict[str, Any] = {
            "causal": True, "mask_token_id": toys.MASK, "logits_shift": True, "block_length": 3
        }  # fmt: skip
        wanted, plain = run(model, Threshold(0.4), **settings)
        found, trace = run(model, Threshold(0.4), FreeCache(policy=policy, block_size=3, window=6), **settings)
        assert torch.equal(found, wanted)
        assert trace.positions < plain.positions


@pytest.mark.prop("freecache-guided-diffusion", 4)
@pytest.mark.parametrize("shift", [False, True])
def test_frozen_rows_are_read_in_order_and_never_written(shift: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    plain = Denoiser.logits

    def logits(denoiser: Denoiser, x: Tensor, **given: Any) -> Any:
        if given.get("frozen") is not None:
            seen.append({"x": x} | given)
        return plain(denoiser, x, **given)

    monkeypatch.setattr(Denoiser, "logits", logits)
    model = toys.random_model()
    for policy in (FreeCache(block_size=4), FreeCache(policy="aggressive"), FreeCache(policy="sliding", window=4)):
        seen.clear()
        run(model, Quota(1), policy, ONE, logits_shift=shift, block_length=4)
        before = 0
        for one in seen:
            low, first = int(one["frozen"]), int((one["x"][0] == toys.MASK).nonzero()[0])
            fed, read = (one[name][0].nonzero()[:, 0].tolist() for name in ("compute", "read"))
            assert fed == list(range(low, fed[-1] + 1))
            assert read == list(range(fed[-1] + 1))
            assert before <= low <= first - shift
            assert one["positions"][0].tolist() == list(range(len(one["x"][0])))
            before = low
        assert before > 9, "something was frozen beyond the prompt"
    monkeypatch.undo()
    denoiser = Denoiser(model, mask_token_id=toys.MASK)
    with pytest.raises(LimitError, match="frozen"):
        denoiser.logits(ONE, frozen=torch.tensor([2]), cache=denoiser.new_cache(1, 9))


def test_frozen_prefixes_by_hand() -> None:
    def at(first: int, clean: int, frozen: int = 0, **settings: Any) -> int:
        given = {"prompt": 10, "policy": "block", "block": 4, "window": 3, "shift": False} | settings
        return int(frozen_prefix(torch.tensor([first]), torch.tensor([clean]), torch.tensor([frozen]), **given))

    assert at(10, 0) == 0
    assert at(10, 10) == at(13, 13) == 10
    assert at(14, 12) == 12
    assert at(15, 15) == 14
    assert at(15, 15, shift=True) == 13
    assert at(15, 15, frozen=14, shift=True) == 14
    assert at(6, 6) == 6
    assert at(15, 13, policy="aggressive") == 13
    assert at(15, 15, policy="aggressive") == at(15, 15, policy="aggressive", shift=True) == 14
    assert at(15, 15, policy="sliding") == 11
    assert at(2, 2, policy="sliding") == 0


def test_places_of_each_policy() -> None:
    """Prompt 9, answer 12, one token a pass from left to right."""
    model = toys.random_model()
    rule = GuidedRule(guide(), **NEVER)

    def fed(policy: FreeCache) -> list[int]:
        _, trace = run(model, rule, policy, ONE, 12)
        assert trace.model_calls == 12
        return trace.positions

    size, first = 21, range(9, 21)
    assert fed(FreeCache(freeze="never")) == 12 * size
    assert fed(FreeCache(block_size=4)) == size + sum(size - min(9 + (f - 9) // 4 * 4, f - 1) for f in first[1:])
    assert fed(FreeCache(policy="aggressive")) == size + sum(size - (f - 1) for f in first[1:])
    assert fed(FreeCache(policy="aggressive", freeze="official")) == size + sum(size - (f - 1) for f in first[1:])
    window = sum(min(size, f - 1 + 3) - (max(f - 1 - 3, 0) if f > 9 else 0) for f in first)
    assert fed(FreeCache(policy="sliding", window=3)) == window


def test_a_sliding_window_reveals_inside_it_only() -> None:
    model = toys.random_model()
    _, trace = run(model, Quota(3), FreeCache(policy="sliding", window=4), ONE, 12)
    old = torch.full((1, 12), toys.MASK)
    for new in trace.history:
        first = int((old[0] == toys.MASK).nonzero()[0])
        assert max((old != new)[0].nonzero()[:, 0].tolist()) < first - 1 + 4
        old = new


# The guide


@pytest.mark.prop("freecache-guided-diffusion", 5)
@pytest.mark.parametrize("shift", [False, True])
def test_every_token_is_the_models_own_argmax(shift: bool) -> None:
    model = toys.random_model("qwen2")
    made = Denoiser(model, mask_token_id=toys.MASK, logits_shift=shift)
    adversary = toys.Table(torch.randint(4, 31, (40,), generator=torch.Generator().manual_seed(1)))
    for judge, settings in ((guide(), ALWAYS | {"top_k": 12}), (adversary, {}), (guide(7), NEVER)):
        _, trace = run(model, GuidedRule(judge, verify_chunk=3, **settings), None, ONE, logits_shift=shift)
        old = torch.full((1, NEW), toys.MASK)
        for new in trace.history:
            batch = made.logits(torch.cat([ONE, old], dim=1))
            best = torch.zeros(1, 9 + NEW, dtype=torch.long)
            best.scatter_(1, batch.targets[batch.valid][None], batch.logits.argmax(-1)[batch.valid][None])
            changed = old != new
            assert torch.equal(new[changed], best[:, 9:][changed])
            assert (old[changed] == toys.MASK).all()
            old = new
        assert not (old == toys.MASK).any()


@pytest.mark.prop("freecache-guided-diffusion", 6)
def test_a_guide_that_always_agrees_takes_one_pass_and_one_that_never_does_as_many_as_tokens() -> None:
    model = toys.random_model()
    _, trace = run(model, GuidedRule(guide(), verify_chunk=4, **ALWAYS))
    assert trace.row_calls == [1, 1, 1]
    assert trace.guide_calls == -(-NEW // 4)
    assert trace.accepted == 3 * NEW
    assert trace.accepted_runs == [[NEW] * 3]
    _, trace = run(model, GuidedRule(guide(), **ALWAYS), FreeCache(policy="sliding", window=5))
    assert trace.model_calls == -(-(NEW - 4) // 4) + 1
    wanted, trace = run(model, GuidedRule(guide(), **NEVER))
    assert trace.row_calls == [NEW] * 3
    assert trace.accepted == 0
    for step, answer in enumerate(trace.history, start=1):
        assert (answer != toys.MASK).tolist() == [[True] * step + [False] * (NEW - step)] * 3
    one = Diffusion(Quota(1), WindowCache(external=20, internal=1, refresh=1, far_field=True, forced=True))
    assert torch.equal(wanted, one.generate(model, IDS, attention_mask=PADDING, max_new_tokens=NEW))


@pytest.mark.prop("freecache-guided-diffusion", 7)
def test_an_oracle_gives_the_text_of_the_guide_that_never_agrees() -> None:
    fewer = []
    for seed in range(4):
        model = toys.random_model(seed=seed)
        wanted, plain = run(model, GuidedRule(guide(), **NEVER), None, ONE)
        found, trace = run(model, GuidedRule(toys.Table(wanted[0]), verify_chunk=3), None, ONE)
        assert torch.equal(found, wanted)
        assert trace.model_calls <= plain.model_calls
        fewer.append(trace.model_calls < plain.model_calls)
    assert any(fewer)


def canvas_of(ids: Tensor, real: Tensor, new: int, seed: int = 0) -> Canvas:
    x = torch.cat([ids, torch.full((len(ids), new), toys.MASK)], dim=1)
    real = torch.cat([real, torch.ones(len(ids), new, dtype=torch.bool)], dim=1)
    settings: dict[str, Any] = {"prompt": ids.shape[1], "mask_id": toys.MASK, "block_length": new, "shift": False}
    positions = Denoiser.default_positions(real)
    made = Canvas.of(x, real, positions, eot_ids=torch.tensor([toys.END]), vocab_size=toys.VOCAB, **settings)
    made.trace = DiffusionTrace()
    made.generators = [torch.Generator().manual_seed(seed + row) for row in range(len(ids))]
    return made


def fresh_run(judge: Any, text: list[int], start: int, drafts: list[int], how: Acceptance, seed: int) -> int:
    """The accepted length by one forward pass over everything, one draft after another."""
    with torch.no_grad():
        logq = judge(torch.tensor([text[:start] + drafts])).logits[0].log_softmax(-1)
    u = torch.rand(len(drafts), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for k, draft in enumerate(drafts):
        q = logq[start - 1 + k : start + k]
        if not bool(accepts(q, torch.tensor([draft]), how, u[k : k + 1])):
            return k
    return len(drafts)


@pytest.mark.prop("freecache-guided-diffusion", 8)
@pytest.mark.parametrize("chunk", [1, 2, 32])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_chunks_with_a_cache_judge_as_a_fresh_pass_does(kind: str, chunk: int) -> None:
    judge, new = guide(4, kind), 12
    generator = torch.Generator().manual_seed(chunk)
    for mode in ("argmax", "topk", "topk_relative", "threshold", "sample", "aggressive"):
        how = Acceptance(mode, top_k=9, threshold=0.02, floor=0.2, top_p=0.7)
        canvas = canvas_of(IDS, PADDING.bool(), new, seed=5)
        made = Judge(judge, canvas, torch.arange(toys.VOCAB), chunk, how)
        for round_ in range(3):
            # Text so far, then a few of the guide's own likeliest tokens, then noise.
            first = canvas.first
            length = torch.randint(1, new - int(first.max()) + 9 + 1, (1,), generator=generator).expand(3)
            drafted = (canvas.places >= first[:, None]) & (canvas.places < (first + length)[:, None])
            text = torch.where(drafted, torch.randint(4, 31, canvas.x.shape, generator=generator), canvas.x)
            for row in range(3):
                own, at = canvas.real[row], int(first[row])
                for place in range(at, at + int(torch.randint(0, 4, (), generator=generator))):
                    if not drafted[row, place]:
                        break
                    with torch.no_grad():
                        so_far = text[row, :place][own[:place]][None]
                        text[row, place] = int(judge(so_far).logits[0, -1, : toys.MASK].argmax())
            for row, one in enumerate(canvas.generators):
                one.manual_seed(100 * round_ + row)
            agreed, _, rejected = made.run(canvas, text, drafted)
            for row in range(3):
                own = canvas.real[row]
                start = int(own[: first[row]].sum())
                drafts = text[row][drafted[row]].tolist()
                wanted = fresh_run(judge, text[row][own].tolist(), start, drafts, how, 100 * round_ + row)
                assert int(agreed[row]) == wanted, (mode, row)
                assert bool(rejected[row]) == (wanted < len(drafts))
            if round_ < 2:
                count = agreed.clamp(min=1).minimum(torch.tensor(new // 3))
                committed = (canvas.places >= first[:, None]) & (canvas.places < (first + count)[:, None])
                canvas.x = torch.where(committed, text, canvas.x)
                made.committed(first + count)
                if round_ == 1:
                    canvas.select(torch.tensor([0, 1, 2]))
                    made.select(torch.tensor([0, 1, 2]))


@pytest.mark.prop("freecache-guided-diffusion", 9)
def test_acceptance_sets_are_nested() -> None:
    generator = torch.Generator().manual_seed(0)
    logq = (3 * torch.randn(500, 9, generator=generator)).log_softmax(-1)
    drafts = torch.randint(9, (500,), generator=generator)
    sets = [accepts(logq, drafts, Acceptance(mode, top_k=3)) for mode in ("argmax", "topk_relative", "topk")]
    sets.append(accepts(logq, drafts, Acceptance("aggressive", top_k=3)))
    for inner, outer in itertools.pairwise(sets):
        assert (inner <= outer).all()
        assert inner.sum() < outer.sum()


def test_acceptance_by_hand() -> None:
    logq = torch.tensor([0.5, 0.3, 0.12, 0.05, 0.02, 0.01]).log().expand(6, -1)
    every = torch.arange(6)

    def good(mode: str, **numbers: Any) -> list[int]:
        return accepts(logq, every, Acceptance(mode, **numbers)).nonzero()[:, 0].tolist()

    assert good("argmax") == [0]
    assert good("topk", top_k=3) == [0, 1, 2]
    assert good("topk_relative") == [0, 1]
    assert good("topk_relative", relative=0.7) == [0]
    assert good("threshold") == [0, 1, 2]
    assert good("aggressive", top_k=1, floor=0.4, top_p=0.45) == [0]
    assert good("aggressive", top_k=2, floor=0.4, top_p=0.1) == [0, 1]
    assert good("aggressive", top_k=1, floor=0.1, top_p=0.1) == [0, 1, 2]
    assert good("aggressive", top_k=1, floor=1.0, top_p=0.95) == [0, 1, 2, 3]
    assert not accepts(logq, torch.full((6,), -1), Acceptance("topk", top_k=6)).any()


@pytest.mark.prop("freecache-guided-diffusion", 10)
def test_what_each_pass_reveals_adds_up() -> None:
    model = toys.random_model()
    for settings in (ALWAYS | {"top_k": 10}, NEVER, {"acceptance": "sample"}):
        _, trace = run(model, GuidedRule(guide(), **settings), eot_id=toys.END)
        for row in range(3):
            assert trace.row_tokens[row] == trace.lengths[row]
            assert trace.row_calls[row] <= trace.lengths[row]
        assert sum(trace.revealed) == trace.tokens == sum(trace.lengths)
        runs = [max(1, n) for one in trace.accepted_runs for n in one]
        assert sum(runs) == trace.tokens
        assert sum(n for one in trace.accepted_runs for n in one) == trace.accepted
        assert len(trace.accepted_runs) == trace.model_calls


@pytest.mark.prop("freecache-guided-diffusion", 11)
def test_the_sample_rule_accepts_with_the_guides_probability() -> None:
    judge, rows = guide(2), 3000
    with torch.no_grad():
        q = judge(ONE).logits[0, -1].softmax(-1)
    draft = int(q.argsort()[-2])
    canvas = canvas_of(ONE.expand(rows, -1), torch.ones(rows, 9, dtype=torch.bool), 1, seed=50)
    text = torch.where(canvas.masked, draft, canvas.x)
    made = Judge(judge, canvas, torch.arange(toys.VOCAB), 32, Acceptance("sample"))
    agreed, _, _ = made.run(canvas, text, canvas.masked)
    p = float(q[draft])
    assert 0.05 < p < 0.95
    assert abs(float(agreed.float().mean()) - p) < 3 * (p * (1 - p) / rows) ** 0.5


class Ending(toys.Llada):
    """Wants the end at the fourth place of the answer and masks elsewhere."""

    def forward(self, input_ids: Tensor, attention_mask: Any = None, attention_bias: Any = None) -> Any:
        logits = super().forward(input_ids, attention_mask).logits
        logits[..., toys.MASK] = 90.0
        logits[..., toys.END] = -90.0
        logits[:, 12:13, toys.END] = 95.0
        return SimpleNamespace(logits=logits)


@pytest.mark.prop("freecache-guided-diffusion", 12)
def test_no_mask_comes_out_when_an_end_token_stops_a_row() -> None:
    ids = ONE.clone()
    ids[0, 2] = toys.END
    for settings in (ALWAYS, NEVER):
        out, trace = run(Ending(), GuidedRule(guide(), **settings), None, ids, mask_token_id=toys.MASK, eot_id=toys.END)
        assert not (out == toys.MASK).any()
        assert out.shape[1] == 9 + 4
        assert int(out[0, -1]) == toys.END
        assert trace.lengths == [4]
        assert trace.accepted <= 4
    rule = GuidedRule(guide(), stop_at_eot=False, **ALWAYS)
    out, _ = run(Ending(), rule, None, ids, mask_token_id=toys.MASK, eot_id=toys.END)
    assert out.shape[1] == 9 + NEW
    assert not (out == toys.MASK).any()


def test_the_guides_token_is_written_on_request() -> None:
    model, judge = toys.random_model(), guide()
    out, trace = run(model, GuidedRule(judge, on_reject="guide"), None, IDS)
    # With the argmax, drafts that pass are the guide's too: the text is the guide's own.
    bad = [[toys.MASK]]
    own = judge.generate(IDS, attention_mask=PADDING, max_new_tokens=NEW, do_sample=False, bad_words_ids=bad)
    assert torch.equal(out, own)
    assert trace.model_calls <= NEW
    drawn, _ = run(model, GuidedRule(judge, on_reject="resample", acceptance="sample"), None, IDS)
    again, _ = run(model, GuidedRule(judge, on_reject="resample", acceptance="sample"), None, IDS)
    assert torch.equal(drawn, again)
    assert not torch.equal(drawn, own)


def test_a_resampled_token_is_not_the_draft() -> None:
    """Never accepted, so the first token is a draw of the guide's law without the draft."""
    model, judge, rows = toys.random_model(), guide(5), 1500
    draft = int(Diffusion(GuidedRule(judge, **NEVER)).generate(model, ONE, max_new_tokens=1)[0, -1])
    rule = GuidedRule(judge, on_reject="resample", **NEVER)
    out, _ = run(model, rule, None, ONE.expand(rows, -1), 1, history=False)
    with torch.no_grad():
        law = judge(ONE).logits[0, -1].softmax(-1)
    law[draft] = 0
    mask = float(law[toys.MASK])  # a mask that the guide draws becomes the draft
    law[toys.MASK], law[draft] = 0, mask / (1 + 0.0)
    law = law / law.sum()
    seen = torch.bincount(out[:, -1], minlength=toys.VOCAB) / rows
    assert (seen - law).abs().max() < 4 * 0.5 / rows**0.5


@pytest.mark.parametrize("on_reject", ["draft", "guide"])
def test_other_ids_of_the_guide_are_mapped(on_reject: Any) -> None:
    """A guide whose ids are permuted judges as before, through the map."""
    model, judge = toys.random_model(), guide()
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(toys.VOCAB, generator=generator)  # id of the model -> id of the guide
    other = guide()
    with torch.no_grad():
        other.model.embed_tokens.weight[order] = judge.model.embed_tokens.weight
        other.lm_head.weight[order] = judge.lm_head.weight
    settings: dict[str, Any] = {"acceptance": "topk", "top_k": 9, "on_reject": on_reject}
    wanted, plain = run(model, GuidedRule(judge, **settings))
    for token_map in (order, dict(enumerate(order.tolist()))):
        found, trace = run(model, GuidedRule(other, token_map=token_map, **settings))
        assert torch.equal(found, wanted)
        assert trace.accepted_runs == plain.accepted_runs
    assert not torch.equal(run(model, GuidedRule(other, **settings))[0], wanted)


def test_a_token_that_the_guide_does_not_have_is_never_accepted() -> None:
    model = toys.random_model()
    never, trace = run(model, GuidedRule(guide(), **NEVER))
    none = torch.full((toys.VOCAB,), -1)
    found, mapped = run(model, GuidedRule(guide(), token_map=none, **ALWAYS))
    assert torch.equal(found, never)
    assert mapped.accepted == 0
    assert trace.model_calls == mapped.model_calls


def test_end_tokens_share_their_probability() -> None:
    ends = (3, 6)
    canvas = canvas_of(ONE, torch.ones(1, 9, dtype=torch.bool), 2)
    canvas.eot_ids = torch.tensor(ends)
    judge = toys.Table(torch.full((20,), 6))
    text = canvas.x.clone()
    text[0, 9:] = 3
    made = Judge(judge, canvas, torch.arange(toys.VOCAB), 8, Acceptance("argmax"))
    assert made.run(canvas, text, canvas.masked)[0].tolist() == [2]
    canvas.eot_ids = torch.tensor([3])
    made = Judge(judge, canvas, torch.arange(toys.VOCAB), 8, Acceptance("argmax"))
    assert made.run(canvas, text, canvas.masked)[0].tolist() == [0]


def test_an_empty_prompt_reveals_its_first_draft_unjudged() -> None:
    model, none = toys.random_model(), torch.empty(2, 0, dtype=torch.long)
    out, trace = run(model, GuidedRule(guide(), **ALWAYS), None, none)
    assert out.shape == (2, NEW)
    assert trace.row_calls == [2, 2]
    assert trace.accepted_runs == [[0, 0], [NEW - 1, NEW - 1]]


def test_work_of_the_guide_is_counted() -> None:
    model, judge = toys.random_model(), guide()
    calls = toys.count_calls(judge)
    with_guide, trace = run(model, GuidedRule(judge, verify_chunk=2, **ALWAYS), None, ONE, 6)
    assert with_guide.shape == (1, 15)
    assert calls == [trace.guide_calls] == [3]
    assert trace.guide_positions == 10 + 2 + 2
    made = Denoiser(model, mask_token_id=toys.MASK)
    own = Denoiser(judge, mask_token_id=None, causal=True)
    expected = made.flops(15, 15) + own.flops(10, 10) + own.flops(2, 12) + own.flops(2, 14)
    assert trace.flops == pytest.approx(expected)


def test_maps_are_checked() -> None:
    same: dict[str, Any] = {"vocabulary": 10, "guide": 10, "special": (9,)}
    assert check_map(None, **same).tolist() == list(range(10))
    fewer: dict[str, Any] = same | {"guide": 9}
    assert check_map(None, **fewer).tolist() == [*range(9), -1]
    assert check_map({2: 5}, **same).tolist() == [-1, -1, 5, *[-1] * 7]
    wrong: Any = (
        (None, {"guide": 8}, "guide.vocab_size = 8"),
        (None, {"guide": 12}, "guide.vocab_size = 12"),
        (torch.arange(9), {}, "token_map.shape"),
        (torch.arange(10) + 1, {}, "token_map = 10"),
        ({11: 1}, {}, "token_map = 11"),
    )
    for bad, settings, text in wrong:
        with pytest.raises(LimitError, match=text):
            check_map(bad, **(same | settings))


def test_tokens_are_matched_by_name() -> None:
    own = SimpleNamespace(get_vocab=lambda: {"a": 0, "b": 1, "<end>": 2, "[M]": 3}, eos_token_id=2)
    theirs = SimpleNamespace(get_vocab=lambda: {"b": 0, "c": 1, "a": 2, "</s>": 3}, eos_token_id=3)
    assert token_map_of(own, theirs, 5).tolist() == [2, 0, 3, -1, -1]


def test_a_guide_that_does_not_fit_is_refused() -> None:
    model = toys.random_model()
    small = models.tiny("llama", vocab=20)
    with pytest.raises(LimitError, match=r"guide\.vocab_size = 20"):
        run(model, GuidedRule(small))
    short = guide()
    short.config.max_position_embeddings = 20
    with pytest.raises(LimitError, match="guide positions = 20"):
        run(model, GuidedRule(short))
    broken = guide()
    broken.lm_head.register_forward_hook(lambda _m, _i, out: out * float("nan"))
    with pytest.raises(NonFiniteError, match="guide") as caught:
        run(model, GuidedRule(broken))
    assert caught.value.partial == [[], [], []]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"acceptance": "hope"}, "acceptance"),
        ({"on_reject": "cry"}, "on_reject"),
        ({"top_k": 0}, "top_k"),
        ({"verify_chunk": 0}, "verify_chunk"),
        ({"threshold": 1.2}, "threshold"),
        ({"relative": float("nan")}, "relative"),
        ({"top_p": -0.1}, "top_p"),
        ({"floor": 2}, "floor"),
        ({"guide": "gpt"}, "guide"),
    ],
)
def test_bad_settings_of_a_guided_rule(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(LimitError, match=text):
        GuidedRule(**{"guide": guide()} | settings)


@pytest.mark.parametrize(
    "settings", [{"policy": "free"}, {"freeze": "soon"}, {"block_size": 0}, {"window": 0}, {"window": True}]
)
def test_bad_settings_of_the_cache(settings: dict[str, Any]) -> None:
    with pytest.raises(LimitError, match=next(iter(settings))):
        FreeCache(**settings)


@pytest.mark.parametrize(
    "policy", [NoCache(), FreeCache(block_size=3), FreeCache(policy="sliding", window=4)], ids=repr
)
@pytest.mark.parametrize("on_reject", ["draft", "resample"])
def test_rows_of_a_batch_are_the_rows_alone(policy: Any, on_reject: Any) -> None:
    """Prompts of three lengths under one guide, rows that end at different times."""
    model = toys.random_model()
    rule = GuidedRule(
        guide(), acceptance="sample" if on_reject == "resample" else "topk", top_k=12, on_reject=on_reject
    )
    decoder = lambda row: Diffusion(rule, policy, seed=row, eot_id=9, logits_shift=True)  # noqa: E731
    together = decoder(0)
    out = together.generate(model, IDS, attention_mask=PADDING, max_new_tokens=NEW)
    for row, (alone, own) in enumerate(toys.rows_alone(decoder, model, IDS, PADDING, NEW)):
        length = together.trace.lengths[row]
        assert own.lengths == [length]
        assert torch.equal(out[row, 9 : 9 + length], alone[:length])
        assert own.row_calls[0] == together.trace.row_calls[row]
