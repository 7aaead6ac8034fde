"""What both decoders refuse, in which words, and what is kept of a run that breaks off."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, StaticCache

from tests.decode.conftest import Zoo
from tests.decode.test_token_recycling import Listener, generate, prompt
from tokenmill.decode.spectr import SpecTr
from tokenmill.decode.token_recycling import AdjacencyMatrix, TokenRecycling, TreeTemplate
from tokenmill.errors import LimitError, NonFiniteError, StoppedError, TokenmillError, UnsupportedError
from tokenmill.models import tiny

Make = Callable[[], Any]
DECODERS: dict[str, Make] = {
    "token-recycling": lambda: TokenRecycling(tree="7"),
    "spectr": lambda: SpecTr(tiny("llama", seed=1, layers=1), num_drafts=1, draft_len=3),
    "spectr in rows": lambda: SpecTr(tiny("llama", seed=1, layers=1), num_drafts=1, draft_len=3, layout="batch"),
}


@pytest.fixture(params=DECODERS)
def make(request: pytest.FixtureRequest) -> Make:
    return DECODERS[request.param]


def assert_refused(kind: type[TokenmillError], work: Callable[[], Any], *words: str) -> TokenmillError:
    with pytest.raises(kind) as refused:
        work()
    for word in words:
        assert word in str(refused.value)
    return refused.value


def test_more_than_one_sequence(zoo: Zoo, make: Make) -> None:
    ids = prompt(6).expand(3, -1)
    assert_refused(UnsupportedError, lambda: generate(zoo("llama", "sdpa"), ids, make()), "one sequence", "batch 3")


def test_beams(zoo: Zoo, make: Make) -> None:
    assert_refused(
        UnsupportedError, lambda: generate(zoo("llama", "sdpa"), prompt(6), make(), num_beams=2), "num_beams = 2"
    )


def test_an_empty_prompt(zoo: Zoo, make: Make) -> None:
    empty = torch.empty(1, 0, dtype=torch.long)
    work = lambda: generate(zoo("llama", "sdpa"), empty, make(), attention_mask=torch.ones_like(empty))  # noqa: E731
    assert_refused(LimitError, work, "prompt length = 0", "at least 1")


def test_a_prompt_beyond_the_models_positions(zoo: Zoo, make: Make) -> None:
    work = lambda: generate(zoo("llama", "sdpa"), prompt(513), make())  # noqa: E731
    assert_refused(LimitError, work, "prompt length = 513", "at most 512")


def caches(model: Any) -> dict[str, Any]:
    offloaded = DynamicCache(config=model.config)
    offloaded.offloading = True
    quantized: Any = DynamicCache(config=model.config)
    quantized.layers[0] = type("QuantizedLayer", (type(quantized.layers[0]),), {})()
    return {
        "StaticCache": StaticCache(config=model.config, max_cache_len=64),
        "QuantizedLayer": quantized,
        "offloading": offloaded,
    }


@pytest.mark.parametrize("name", ["StaticCache", "QuantizedLayer", "offloading"])
def test_a_cache_whose_rows_cannot_be_dropped(zoo: Zoo, make: Make, name: str) -> None:
    model = zoo("llama", "sdpa")
    work = lambda: generate(model, prompt(6), make(), past_key_values=caches(model)[name])  # noqa: E731
    assert_refused(UnsupportedError, work, name, "dynamic cache")


def test_the_static_cache_that_generate_would_make(zoo: Zoo, make: Make) -> None:
    work = lambda: generate(zoo("llama", "sdpa"), prompt(6), make(), cache_implementation="static")  # noqa: E731
    assert_refused(UnsupportedError, work, "StaticCache")


def test_no_cache(zoo: Zoo, make: Make) -> None:
    work = lambda: generate(zoo("llama", "sdpa"), prompt(6), make(), use_cache=False)  # noqa: E731
    assert_refused(UnsupportedError, work, "needs a KV cache", "use_cache=True")


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention"])
def test_attention_that_takes_no_tree_mask(name: str) -> None:
    for decoder in (DECODERS["token-recycling"](), DECODERS["spectr"]()):
        model = tiny("llama", layers=1)
        model.config._attn_implementation = name
        assert_refused(
            UnsupportedError, lambda d=decoder, m=model: generate(m, prompt(6), d), name, "tree mask", "sdpa"
        )


def test_layers_that_take_no_tree_mask(make: Make) -> None:
    model = tiny("llama", layers=1)
    model.config.layer_types = ["chunked_attention"]
    work = lambda: generate(model, prompt(6), make(), past_key_values=DynamicCache())  # noqa: E731
    assert_refused(UnsupportedError, work, "chunked_attention")


def test_attentions_and_hidden_states_of_a_draft(zoo: Zoo, make: Make) -> None:
    asked = {"return_dict_in_generate": True, "output_hidden_states": True}
    assert_refused(
        UnsupportedError, lambda: generate(zoo("llama", "sdpa"), prompt(6), make(), **asked), "hidden states"
    )


def poisoned(at: int, value: float = torch.nan) -> Any:
    """A model whose logits hold ``value`` in one place from its call number ``at`` on."""
    model, calls = tiny("llama", layers=1), []

    def poison(module: Any, args: Any, out: Any) -> Any:
        calls.append(1)
        if len(calls) >= at:
            out.logits = out.logits.clone()
            out.logits[..., -1, 5] = value
        return out

    model.register_forward_hook(poison)
    return model


@pytest.mark.parametrize("at", [1, 2, 6])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite(make: Make, at: int, value: float) -> None:
    """What was produced before is on the error, on the trace, and was streamed."""
    decoder, ids, listener = make(), prompt(6), Listener()
    long = {"max_new_tokens": 60}
    whole = generate(tiny("llama", layers=1), ids, **long)[0].tolist()
    work = lambda: generate(poisoned(at, value), ids, decoder, token_streamer=listener, **long)  # noqa: E731
    error = assert_refused(NonFiniteError, work, f"hold {value}", f"at call {at}", "finite")
    assert f"{len(decoder.trace.tokens_so_far)} new tokens" in str(error)
    assert isinstance(error, FloatingPointError)
    assert error.partial == decoder.trace.tokens_so_far
    assert len(error.partial) >= at - 1
    assert error.partial == whole[6 : 6 + len(error.partial)]
    assert listener.heard == whole[: 6 + len(error.partial)]
    assert listener.ends == 1


def test_logits_of_a_drafter_that_are_not_finite(zoo: Zoo) -> None:
    decoder = SpecTr(poisoned(4), num_drafts=1, draft_len=3)
    error = assert_refused(
        NonFiniteError, lambda: generate(zoo("llama", "sdpa"), prompt(6), decoder), "draft model", "nan"
    )
    assert error.partial == decoder.trace.tokens_so_far != []


def test_an_error_of_the_callers_own_leaves_the_tokens_on_the_trace(zoo: Zoo, make: Make) -> None:
    decoder, listener = make(), Listener()

    def fails(input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        if input_ids.shape[1] >= 10:
            raise KeyError("the caller's")
        return torch.tensor([False])

    with pytest.raises(KeyError, match="the caller's"):
        generate(zoo("llama", "sdpa"), prompt(6), decoder, stopping_criteria=[fails], token_streamer=listener)
    assert decoder.trace.tokens_so_far == generate(zoo("llama", "sdpa"), prompt(6))[0, 6:10].tolist()
    assert listener.ends == 1
    generate(zoo("llama", "sdpa"), prompt(6), decoder)  # the object is free again


def during(model: Any, work: Callable[[], Any]) -> tuple[Callable[[], None], list[BaseException]]:
    """Run ``work`` in another thread while the model's first forward is under way."""
    raised: list[BaseException] = []
    started: list[bool] = []

    def second() -> None:
        try:
            work()
        except TokenmillError as error:
            raised.append(error)

    def hook(*_: Any) -> None:
        if not started:
            started.append(True)
            thread = threading.Thread(target=second)
            thread.start()
            thread.join()

    return model.register_forward_pre_hook(hook).remove, raised


def test_a_second_call_of_one_object_at_the_same_time(zoo: Zoo, make: Make) -> None:
    model, other, decoder, ids = tiny("llama", seed=3), zoo("llama", "sdpa"), make(), prompt(6)
    remove, raised = during(model, lambda: generate(other, ids, decoder))
    made = generate(model, ids, decoder)
    remove()
    assert [type(e) for e in raised] == [StoppedError]
    assert "a call of this object is under way" in str(raised[0])
    assert torch.equal(made, generate(other, ids))
    assert decoder.trace.tokens == made.shape[1] - 6


def test_a_state_that_another_call_uses(zoo: Zoo) -> None:
    model, other, ids = tiny("llama", seed=3), zoo("llama", "sdpa"), prompt(6)
    first = TokenRecycling(tree="7").hot(model)
    second = TokenRecycling(first.state, tree="7")
    remove, raised = during(model, lambda: generate(other, ids, second))
    made = generate(model, ids, first)
    remove()
    assert [type(e) for e in raised] == [StoppedError]
    assert "state is in use by another call" in str(raised[0])
    assert torch.equal(made, generate(model, ids))
    assert torch.equal(generate(other, ids, second), made)


def test_a_state_of_another_vocabulary(zoo: Zoo) -> None:
    work = lambda: generate(zoo("llama", "sdpa"), prompt(6), TokenRecycling(AdjacencyMatrix(32)))  # noqa: E731
    assert_refused(LimitError, work, "state.vocab_size = 32", "64")


def test_a_drafter_of_another_vocabulary(zoo: Zoo) -> None:
    decoder = SpecTr(tiny("llama", vocab=48, layers=1))
    assert_refused(LimitError, lambda: generate(zoo("llama", "sdpa"), prompt(6), decoder), "48", "64", "vocab_size")
    decoder = SpecTr(tiny("llama", vocab=48, layers=1), vocab_size=50)
    assert_refused(
        LimitError, lambda: generate(zoo("llama", "sdpa"), prompt(6), decoder), "vocab_size = 50", "at most 48"
    )


@pytest.mark.parametrize(
    ("work", "words"),
    [
        (lambda: TokenRecycling(k=4), ("rank 7", "below k=4")),
        (lambda: TokenRecycling(AdjacencyMatrix(64, 3)), ("rank 7", "below k=3")),
        (lambda: TokenRecycling(k=2, tree=TreeTemplate([(0,), (2,)])), ("rank 2", "below k=2")),
        (lambda: TokenRecycling(k=0), ("k = 0", "at least 1")),
        (lambda: TokenRecycling(tree="auto!"), ("'auto!'", "Did you mean auto")),
        (lambda: TokenRecycling(draft="ngram"), ("draft = 'ngram'", "hybrid")),  # pyright: ignore
        (lambda: TokenRecycling(seed=-1), ("seed = -1", ">= 0")),
        (lambda: SpecTr(tiny("llama", layers=1), num_drafts=0), ("num_drafts = 0", "at least 1")),
        (lambda: SpecTr(tiny("llama", layers=1), draft_len=0), ("draft_len = 0", "at least 1")),
        (lambda: SpecTr(tiny("llama", layers=1), draft_len=True), ("draft_len = True", "integer")),
        (lambda: SpecTr(tiny("llama", layers=1), vocab_size=0), ("vocab_size = 0", "at least 1")),
        (lambda: SpecTr(tiny("llama", layers=1), layout="rows"), ("layout = 'rows'", "batch")),  # pyright: ignore
        (lambda: SpecTr(tiny("llama", layers=1), seed=-2), ("seed = -2", ">= 0")),
    ],
)
def test_settings_outside_their_limits(work: Callable[[], Any], words: tuple[str, ...]) -> None:
    assert_refused(LimitError, work, *words)


def test_a_streamer_ends_when_the_call_is_refused(zoo: Zoo) -> None:
    """A consumer that waits in another thread must not wait for ever."""
    decoders = (SpecTr(tiny("llama", vocab=48, layers=1)), TokenRecycling(AdjacencyMatrix(32)))
    for decoder in decoders:
        listener = Listener()
        with pytest.raises(LimitError):
            generate(zoo("llama", "sdpa"), prompt(6), decoder, token_streamer=listener)
        assert listener.ends == 1
