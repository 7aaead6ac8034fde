"""Word-pooled models: the cutting of texts, causality, padding, probabilities, generation, for several backbones."""

from __future__ import annotations

import copy
import itertools
import math
import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, BertConfig, GPT2Config, LlamaConfig, Qwen2Config

from tests.text import vocabularies
from tokenmill.errors import LimitError, UnsupportedError
from tokenmill.text import LearnYourTokens, WordPooledConfig, WordPooledLM, WordSegmenter
from tokenmill.text import _word_generation as generation
from tokenmill.text._word_generation import padded_words
from tokenmill.text.kl3m_tokenizers import small as toy

TEXT = "def foo(self, x):\n    return  x+12345678901  # naïve é\r\n\t日本語日本語日本語"
BACKBONES = {
    "llama": LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64
    ),
    "qwen2": Qwen2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64
    ),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=256, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
    "gemma3_text": AutoConfig.for_model(
        "gemma3_text", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, head_dim=8, sliding_window=512,
    ),
}  # fmt: skip


@cache
def made(backbone: str = "llama", p: int = 2, c: int = 6, **more: Any) -> Any:
    """A model with weights large enough to tell one input from another."""
    torch.manual_seed(0)
    shape = LearnYourTokens(num_prefix=p, c_max=c, enc_layers=1, dec_layers=2, dec_heads=4, dropout=0.0)
    config = copy.deepcopy(BACKBONES[backbone])
    model = shape.model(WordSegmenter(c_max=c), config)
    for name, value in more.items():
        setattr(model.config, name, value)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.15)
    return model.eval()


def words(texts: list[str], c: int = 6) -> Any:
    return padded_words([WordSegmenter(c_max=c).encode(text) for text in texts])


@pytest.mark.prop("learn-your-tokens", 1)
@settings(max_examples=300, deadline=None)
@given(st.text(), st.integers(1, 9))
def test_any_text_comes_back(text: str, c: int) -> None:
    for one in (WordSegmenter(c_max=c), WordSegmenter("char", c_max=c, characters="ab é日\n")):
        units, lengths = one.encode(text)
        assert one.decode(units, lengths) == text
        assert "".join(one.words(text)) == text
        assert units.shape == (len(lengths), c)
        assert not len(lengths) or (lengths.min() >= 1 and lengths.max() <= c)
        assert int(one.bytes_of(units)[np.arange(c) < lengths[:, None]].sum()) == len(text.encode())


@pytest.mark.prop("learn-your-tokens", 1)
def test_texts_in_many_scripts_come_back_from_every_base() -> None:
    bases = (
        WordSegmenter(),
        WordSegmenter.of_characters(vocabularies.LINES, least=2),
        WordSegmenter("sub", tokenizer=toy().backend_tokenizer, c_max=5),
    )
    for text in (*vocabularies.corpus(texts=80), TEXT, "  \t\r\n \n", "e\u0301\u0300", "x" * 1000):
        for one in bases:
            units, lengths = one.encode(text)
            found = one.decode(units, lengths)
            assert found == text or one.base == "sub", (one.base, text)
    assert bases[2].decode(*bases[2].encode("def f(x): return 2024")) == "def f(x): return 2024"


def test_blanks_go_with_the_next_word_and_long_words_go_on() -> None:
    one = WordSegmenter(c_max=4)
    assert one.words("def  foo(x1):\n    y") == ["def", " ", " foo", "(", "x", "1", "):", "\n   ", " y"]
    units, lengths = one.encode("abcdefghij k")
    assert lengths.tolist() == [4, 4, 2, 2]
    assert bytes(units[2, :2].tolist()) == b"ij"


@pytest.mark.prop("learn-your-tokens", 2)
@pytest.mark.parametrize("backbone", list(BACKBONES))
def test_no_unit_is_seen_before_it_is_predicted(backbone: str) -> None:
    model = made(backbone)
    units, lengths, mask = words(["the quick brown fox"])
    with torch.inference_mode():
        before = model(units, lengths, mask).logits
        for t, j in ((0, 0), (1, 2), (2, 4), (3, 1)):
            other = units.clone()
            other[0, t, j] = (other[0, t, j] + 7) % 256
            after = model(other, lengths, mask).logits
            assert torch.equal(after[0, :t], before[0, :t])
            assert torch.equal(after[0, t, : j + 1], before[0, t, : j + 1])
            assert not torch.allclose(after[0, t, j + 1], before[0, t, j + 1], atol=1e-4)
            if t < 3:
                assert not torch.allclose(after[0, t + 1, 0], before[0, t + 1, 0], atol=1e-5)


@pytest.mark.prop("learn-your-tokens", 3)
@pytest.mark.parametrize("backbone", list(BACKBONES))
def test_padding_changes_nothing(backbone: str) -> None:
    model = made(backbone)
    texts = ["the quick brown", "a b", "extraordinary words"]
    units, lengths, mask = words(texts)
    with torch.inference_mode():
        together = model(units, lengths, mask).logits
        noisy = units.clone()
        noisy[torch.arange(6) >= lengths[..., None]] = 999  # what lies behind a word's end is not read
        assert torch.equal(model(noisy, lengths, mask).logits, together)
        for row, text in enumerate(texts):
            own, sizes, _ = words([text])
            for wide in (own, torch.nn.functional.pad(own, (0, 0))):
                alone = model(wide, sizes).logits[0]
                here = together[row, : alone.shape[0], : alone.shape[1]]
                real = torch.arange(alone.shape[1]) <= sizes[0][:, None]
                assert torch.allclose(here[real], alone[real], atol=1e-5)
        # A narrower row of the same words.
        own, sizes, _ = words(["a b"])
        narrow = model(own[:, :, :2], sizes).logits
        assert torch.allclose(narrow[0, :, :2], model(own, sizes).logits[0, :, :2], atol=1e-6)


@pytest.mark.prop("learn-your-tokens", 4)
@pytest.mark.parametrize("backbone", list(BACKBONES))
def test_scores_are_the_sums_of_steps_with_caches(backbone: str) -> None:
    from transformers import DynamicCache

    model = made(backbone)
    text = "the quick extraordinary"
    units, lengths = model.segmenter.encode(text)
    wanted = model.score([text])[0].log_probs
    cache, mask = DynamicCache(), torch.ones(1, 1, dtype=torch.bool)
    vectors = model.start[None, None]
    with torch.inference_mode():
        for t, (row, n) in enumerate(zip(units, lengths.tolist(), strict=True)):
            seen = None if t == 0 else torch.tensor([t])
            states, cache = model.read(vectors, mask, cache, seen)
            logits, kept = model.decode(states[:, -1] + model.out_position[: model.config.num_prefix], None)
            total = 0.0
            for j in range(n + (n < 6)):
                unit = int(row[j]) if j < n else 256
                total += float(logits[0, -1].double().log_softmax(-1)[unit])
                if j < n and j < 5:
                    place = model.config.num_prefix + j
                    step = model.embedding(torch.tensor([[unit]])) + model.out_position[place]
                    logits, kept = model.decode(step, kept)
            assert total == pytest.approx(wanted[t], abs=1e-4)
            own = (torch.tensor(row)[None, None], torch.tensor([[n]]), torch.ones(1, 1, dtype=torch.bool))
            vectors = model.pool(*own)
            mask = torch.ones(1, t + 2, dtype=torch.bool)


@pytest.mark.prop("learn-your-tokens", 5)
def test_all_words_together_have_probability_one() -> None:
    torch.manual_seed(0)
    config = WordPooledConfig(copy.deepcopy(BACKBONES["llama"]), unit_vocab_size=3, num_prefix=1, c_max=3)
    model = WordPooledLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
    total, forced = 0.0, 0.0
    context = [[1, 2, 0]]
    for n in range(4):
        for word in itertools.product(range(3), repeat=n):
            rows = torch.tensor([[*context, [*word, *[0] * (3 - n)]]])
            sizes = torch.tensor([[2, n]])
            with torch.inference_mode():
                logits = model(rows, sizes).logits[0, 1].double().log_softmax(-1)
            wanted = model.targets(rows[0, 1:], sizes[0, 1:])[0]
            places = [j for j in range(4) if wanted[j] != -100]
            assert len(places) == n + (n < 3)
            value = math.exp(sum(float(logits[j, wanted[j]]) for j in places))
            total += value
            forced += value if n == 3 else 0.0
    assert total == pytest.approx(1.0, abs=1e-6)
    assert 0.05 < forced < 0.95


@pytest.mark.prop("learn-your-tokens", 6)
def test_words_of_one_unit_are_a_plain_causal_model_over_units() -> None:
    model = made("llama", p=1, c=1)
    units = torch.tensor([[[7], [3], [250], [7]]])
    lengths = torch.ones(1, 4, dtype=torch.int64)
    with torch.inference_mode():
        found = model(units, lengths).logits[0, :, 0]
        rows = [model.start[None]]
        for unit in units[0, :3, 0]:
            pair = model.embedding(torch.tensor([256, int(unit)])) + model.in_position[:2]
            rows.append(model.encoder(pair[None])[:, :1])
        states = model.backbone(inputs_embeds=torch.cat(rows, dim=1)).last_hidden_state
        x = states[0, :, None] + model.out_position[:1]
        for block in model.decoder:
            x = block(x, None)[0]
        assert torch.allclose(found, model.head(model.norm(x))[:, 0], atol=1e-5)


@pytest.mark.prop("learn-your-tokens", 7)
@pytest.mark.parametrize("backbone", list(BACKBONES))
def test_writing_with_and_without_a_cache_alone_and_in_a_batch(backbone: str) -> None:
    model = made(backbone)
    prompts = ["the quick brown fo", "a", "", "extraordinary "]
    together = model.generate(prompts, max_new_words=5)
    assert model.generate(prompts, max_new_words=5, use_cache=False) == together
    assert [model.generate([prompt], max_new_words=5)[0] for prompt in prompts] == together
    assert any(together)
    seen: list[tuple[int, int]] = []
    hook = model.backbone.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"].shape[:2]), with_kwargs=True
    )
    units, lengths, mask = words(["the quick brown fox"])
    model(units, lengths, mask)
    hook.remove()
    assert seen == [(1, 2 * 4)]  # p vectors a word, the last word is only predicted and the start stands in for it


@pytest.mark.prop("learn-your-tokens", 8)
def test_nothing_given_is_changed_and_twice_is_the_same() -> None:
    model = made()
    units, lengths, mask = words(["the quick brown fox", "a b"])
    before = [t.clone() for t in (units, lengths, mask)]
    with torch.inference_mode():
        first, second = (model(units, lengths, mask, labels=True) for _ in range(2))
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(first.loss, second.loss)
    for now, then in zip((units, lengths, mask), before, strict=True):
        assert torch.equal(now, then)


@pytest.mark.prop("learn-your-tokens", 9)
def test_bits_by_byte_are_the_same_by_unit_and_by_word() -> None:
    model = made()
    text = "naïve words, 日本 extraordinary"
    scores = model.score([text, "x"])[0]
    assert "".join(scores.words).replace("�", "") != ""
    units, lengths, mask = words([text])
    with torch.inference_mode():
        found = model(units, lengths, mask, labels=True)
    targets = model.targets(units[0], lengths[0])
    count = int((targets != -100).sum())
    nats = float(found.loss) * count
    assert scores.bytes == len(text.encode())
    assert scores.bits_per_byte == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)
    assert count == len(text.encode()) + int((lengths < 6).sum())


@pytest.mark.prop("learn-your-tokens", 10)
def test_every_part_gets_a_gradient() -> None:
    for block_size in (None, 16):
        config = WordPooledConfig(copy.deepcopy(BACKBONES["llama"]), num_prefix=2, c_max=6, block_size=block_size)
        model = WordPooledLM(config).train()
        units, lengths, mask = words(["the quick brown fox", "a b"])
        model(units, lengths, mask, labels=True).loss.backward()
        for name, weight in model.named_parameters():
            if name != "backbone.embed_tokens.weight":  # the backbone's own vocabulary is not used
                assert weight.grad is not None, name
                assert weight.grad.abs().sum() > 0, name
        assert (model.word_position is None) == (block_size is None)


def test_it_learns_and_round_trips(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = LearnYourTokens(num_prefix=2, c_max=8, enc_layers=1, dec_layers=1, dec_heads=4, dropout=0.0)
    model = shape.model(shape.segmenter(), copy.deepcopy(BACKBONES["llama"])).train()
    text = "one two three four five six seven eight. "
    units, lengths, mask = words([text * 2], 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(120):
        loss = model(units, lengths, mask, labels=True).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    assert model.score([text])[0].bits_per_byte < 0.7
    assert model.generate(["one two th"], max_new_words=3) == ["ree four five"]
    assert model.generate(["one two fi"], max_new_words=1) == ["ve"]  # no likely word, but it was begun
    seen: list[tuple[int, str]] = []
    model.generate(["one two th"], max_new_words=3, on_word=lambda row, word: seen.append((row, word)))
    assert seen == [(0, "ree"), (0, " four"), (0, " five")]
    model.save_pretrained(tmp_path)
    again = WordPooledLM.from_pretrained(tmp_path).eval()
    assert again.generate(["one two th"], max_new_words=3) == ["ree four five"]
    assert again.score([text])[0].log_probs == pytest.approx(model.score([text])[0].log_probs, abs=1e-5)
    assert again.config.backbone.model_type == "llama"


def test_an_empty_word_ends_a_text_and_full_words_go_on() -> None:
    model = made(c=4, p=1)
    with torch.no_grad():
        kept = model.head.weight.clone()
        model.head.weight[256] = model.head.weight.new_full((32,), 0.0)
        bias = model.norm.bias.clone()
        model.norm.bias.fill_(5.0)
        model.head.weight[256] += 10.0  # the end is always likeliest
        assert model.generate(["", "ab"], max_new_words=5) == ["", ""]
        model.head.weight[256] -= 20.0  # and never
        found = model.generate(["ab"], max_new_words=3)[0]
        model.head.weight.copy_(kept)
        model.norm.bias.copy_(bias)
    assert len(model.segmenter.encode("ab" + found)[0]) >= 1
    assert len(found.encode()) >= 2 + 4 + 4 - 2  # the forced word up to c_max, and two full ones


def test_an_ended_text_stays_ended_while_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made()
    script = iter([[1, 1], [0, 1], [1, 1], [1, 1]])

    def word(_: Any, states: torch.Tensor, *more: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((len(states), 6), 97), torch.tensor(next(script))

    monkeypatch.setattr(generation, "_word", word)
    assert model.generate(["", ""], max_new_words=4) == ["a", "aaaa"]


def test_sampling_is_seeded_and_follows_the_temperature() -> None:
    model = made()

    def drawn(seed: int, **more: Any) -> list[str]:
        generator = torch.Generator().manual_seed(seed)
        return model.generate(["the "], max_new_words=6, do_sample=True, generator=generator, **more)

    greedy = model.generate(["the "], max_new_words=6)
    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert drawn(1, top_k=1) == greedy
    assert drawn(1, temperature=1e-4) == greedy


def test_characters_and_subwords_are_units_too(tmp_path: Path) -> None:
    texts = ["naïve naïve words ok", "日本"]
    chars = WordSegmenter.of_characters(texts, least=2)
    units, lengths = chars.encode("naï☃")
    assert lengths.tolist() == [3, 3]  # a sign of its own: three bytes for a character that is not known
    assert units[0, 0] >= 256 > units[1, 0]
    subs = WordSegmenter("sub", tokenizer=toy().backend_tokenizer, c_max=5)
    for one in (chars, subs):
        one.save(tmp_path)
        again = WordSegmenter.load(tmp_path)
        assert all(np.array_equal(a, b) for a, b in zip(one.encode("def f(x)"), again.encode("def f(x)"), strict=True))
        assert (again.base, again.size, again.c_max) == (one.base, one.size, one.c_max)
        shape = LearnYourTokens(base=one.base, c_max=one.c_max, dec_heads=4)  # type: ignore[arg-type]
        model = shape.model(one, copy.deepcopy(BACKBONES["llama"]))
        assert model.score(["def f(x)"])[0].bits_per_byte > 0


def test_bad_input_is_refused(tmp_path: Path) -> None:
    model = made()
    units, lengths, _ = words(["a b"])
    with pytest.raises(LimitError, match="unit id 260 outside base vocabulary of size 256"):
        model(units.clone().fill_(260), lengths)
    with pytest.raises(LimitError, match="unit id 256 outside base vocabulary of size 256"):
        model.segmenter.decode([[256]], [1])
    with pytest.raises(LimitError, match="at least one word"):
        model(units[:, :0], lengths[:, :0])
    with pytest.raises(LimitError, match="c_max=6"):
        model(torch.zeros(1, 1, 9, dtype=torch.int64), torch.tensor([[9]]))
    with pytest.raises(LimitError, match="at least one character"):
        model.score(["a", ""])
    with pytest.raises(LimitError, match="free of lone surrogates"):
        model.score(["\ud800"])
    with pytest.raises(LimitError, match="max_new_words = 0"):
        model.generate(["a"], max_new_words=0)
    with pytest.raises(LimitError, match="temperature"):
        model.generate(["a"], temperature=0.0)
    assert model.generate([]) == []
    config = WordPooledConfig(copy.deepcopy(BACKBONES["llama"]), num_prefix=2, c_max=6, block_size=3)
    with pytest.raises(LimitError, match="block_size=3"):
        WordPooledLM(config)(*words(["a b c d e f"]))
    with pytest.raises(UnsupportedError, match="backbone of type bert"):
        WordPooledLM(WordPooledConfig(BertConfig(hidden_size=32)))
    with pytest.raises(LimitError, match="a divisor of the width 32"):
        WordPooledLM(WordPooledConfig(copy.deepcopy(BACKBONES["llama"]), dec_heads=5))
    with pytest.raises(UnsupportedError, match="no segmenter"):
        WordPooledLM(config).score(["a"])
    with pytest.raises(LimitError, match="base"):
        WordSegmenter("letters")  # type: ignore[arg-type]
    with pytest.raises(LimitError, match="tokenizer"):
        WordSegmenter("sub")
    with pytest.raises(LimitError, match="segmenter = 'byte'"):
        LearnYourTokens(base="char").model(WordSegmenter(), BACKBONES["llama"])
    with pytest.raises(LimitError, match=r"words\.json"):
        WordSegmenter.load(tmp_path)
    random.seed(0)
