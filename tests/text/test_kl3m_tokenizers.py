"""KL3M tokenizers: what is trained, what is added, and what is refused."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from tests.text.vocabularies import corpus
from tokenmill import corpora
from tokenmill.errors import LimitError
from tokenmill.text import KL3M_SPECIALS, CustomTokens, TokenBytes, train_char_bpe, train_domain_bpe
from tokenmill.text import _bpe_training as bpe
from tokenmill.text._corpus_stream import CorpusStream, pieces

SLUG = "kl3m-tokenizers"
RUSSIAN = "Съешь же ещё этих мягких французских булок, да выпей чаю. "
NONE = CustomTokens.only()


@cache
def code() -> list[str]:
    return [r.text[:20_000] for r in corpora.load("python-stdlib").split("train")][:30]


@cache
def domain() -> Any:
    return train_domain_bpe(code(), 4096)


@cache
def char() -> Any:
    return train_char_bpe(code(), 1024)


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.prop("kl3m-tokenizers", 1)
def test_a_text_comes_back_normalised() -> None:
    uncased = train_domain_bpe(code(), 2048, lowercase=True, custom_tokens=CustomTokens.only(years=("2024",)))
    for text in [*corpus(1, 100), *code()[:2], "½ ﬁ ２０２４ ①"]:
        clean = unicodedata.normalize("NFKC", text)
        for made in (domain(), char()):
            if not any(mark in clean for mark in KL3M_SPECIALS):
                assert made.decode(ids(made, text)) == clean
        lowered = normalizers.Lowercase().normalize_str(clean)
        assert uncased.decode(ids(uncased, text)) == lowered


@pytest.mark.prop("kl3m-tokenizers", 2)
def test_size_specials_and_the_saved_tokenizer(tmp_path: Path) -> None:
    for made, size in ((domain(), 4096), (char(), 1024), (train_domain_bpe(code(), 1500, custom_tokens=NONE), 2048)):
        assert len(made) == size
        assert made.convert_ids_to_tokens(list(range(13))) == list(KL3M_SPECIALS)
        assert sorted(made.get_vocab().values()) == list(range(size))
        assert (made.padding_side, made.pad_token_id, made.eos_token_id, made.bos_token_id) == ("left", 2, 1, 0)
    domain().save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    bare = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert again.convert_ids_to_tokens(list(range(13))) == list(KL3M_SPECIALS)
    for text in corpus(2, 980):
        assert ids(again, text) == ids(domain(), text) == bare.encode(text, add_special_tokens=False).ids


@pytest.mark.prop("kl3m-tokenizers", 3)
@pytest.mark.parametrize("longest", [1, 2, 3, 4])
def test_no_token_is_longer_than_the_cap(longest: int) -> None:
    size = 269 if longest == 1 else 600
    made = train_char_bpe(code(), size, longest, pad_to_power_of_two=False)
    view = TokenBytes.of(made)
    assert max(len(t) for t in view.tokens if t) == longest
    model = json.loads(made.backend_tokenizer.to_str())["model"]
    assert all(len(a + b) <= longest for a, b in model["merges"])
    if longest == 1:
        assert len(ids(made, "naïve façade")) == len("naïve façade".encode())


def test_a_cap_in_characters() -> None:
    texts = [RUSSIAN + "天地玄黃宇宙洪荒 天地 "] * 9
    made = train_char_bpe([*texts, *code()[:3]], 700, 2, unit="char", pad_to_power_of_two=False, short="fill")
    whole = [t.decode() for t in TokenBytes.of(made).tokens if t and _is_text(t) and t.strip()]
    assert max(map(len, whole)) == 2
    assert any(len(t) == 2 and t.isalpha() and not t.isascii() for t in whole), "two Cyrillic letters are one token"
    symbols = train_char_bpe([*texts, *code()[:3]], 700, 2, pad_to_power_of_two=False, short="fill")
    assert len(ids(made, RUSSIAN)) < len(ids(symbols, RUSSIAN))
    for text in corpus(3, 40):
        clean = unicodedata.normalize("NFKC", text)
        assert made.decode(ids(made, text)) == clean
    assert len(ids(made, "天地")) <= 2


def _is_text(token: bytes) -> bool:
    try:
        token.decode()
    except UnicodeDecodeError:
        return False
    return True


@pytest.mark.prop("kl3m-tokenizers", 4)
def test_without_additions_it_is_plain_bpe() -> None:
    made = train_domain_bpe(code(), 1500, custom_tokens=NONE, pad_to_power_of_two=False)
    plain = Tokenizer(models.BPE())
    plain.normalizer = normalizers.NFKC()
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        min_frequency=1,
        show_progress=False,
        special_tokens=list(KL3M_SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    plain.train_from_iterator(code(), trainer)
    ours, theirs = (json.loads(t.to_str())["model"] for t in (made.backend_tokenizer, plain))
    assert ours["vocab"] == theirs["vocab"]
    assert ours["merges"] == theirs["merges"]


@pytest.mark.prop("kl3m-tokenizers", 5)
def test_a_custom_token_is_one_id_where_it_is_meant() -> None:
    made = train_domain_bpe(code(), 4096, custom_tokens=CustomTokens(citations=("U.S.C.", "F.3d")))
    of = TokenBytes.of(made)
    for text, token in (
        ("§ 362(a) of", "(a)"),
        ("in 2024, the", "2024"),
        ("42 U.S.C. § 1983", "U.S.C."),
        ("12 F.3d 4", "F.3d"),
        ('x <a href="y">', "<a"),
        ("x</div>", "</div>"),
        ("see www.example.org", "www."),
        ('{"a": null}', "null"),
        ("x" + " " * 8, " " * 8),
        ("２０２４ wide", "2024"),
    ):
        assert token.encode() in [of.tokens[i] for i in ids(made, text)], text


@pytest.mark.parametrize(
    "text", ["12345", "x86_64", "A1234", "v202", "nullable", "U.S.C.A", "_99", "20245", "annulled"]
)
def test_custom_tokens_do_not_cut_words(text: str) -> None:
    """With no merges learned of them, what is cut out of a word would show as an added token."""
    made = train_domain_bpe(["zzz"], 4096, custom_tokens=CustomTokens(citations=("U.S.C.",)), short="fill")
    added = made.get_added_vocab()
    assert not [t for t in made.tokenize(text) if t in added]


def test_numbers_with_points_are_cut_at_the_points() -> None:
    made = train_domain_bpe(["zzz"], 4096, short="fill")
    assert made.tokenize("1.10") == ["1", ".", "10"]
    assert made.tokenize("2024") == ["2024"]


def test_custom_tokens_are_compared_as_text() -> None:
    tokens = CustomTokens.only(html=(" href=", " class"), code=("self.", "return"))
    learned = bpe.train_bpe(["x class return self. " * 5], 60)
    assert "Ġclass" in learned.vocabulary()
    made = train_domain_bpe(["x class return self. " * 5], 400, custom_tokens=tokens, short="fill")
    assert " class" not in made.get_added_vocab()
    assert {" href=", "self."} <= set(made.get_added_vocab())
    assert len(made) == 512


def test_custom_tokens_are_sorted_normalised_and_checked() -> None:
    upper = bpe.make_normalizer("x", "nfkc", lowercase=True)
    assert CustomTokens.only(code=("Ab", "aB", "x", "½", "zz")).texts(upper) == ("1⁄2", "ab", "zz")
    texts = CustomTokens().texts()
    assert list(texts) == sorted(set(texts))
    assert min(map(len, texts)) == 2
    assert {"1776", "2049", "10", "999", "(Z)", "(ix)", "(99)", "\r\n", "\t ", " " * 8} <= set(texts)
    with pytest.raises(LimitError, match="decodes to itself"):
        CustomTokens.only(citations=("§§",)).added()
    with pytest.raises(LimitError, match="sequence of strings"):
        CustomTokens(years="2024")  # type: ignore[arg-type]


@pytest.mark.prop("kl3m-tokenizers", 6)
@pytest.mark.prop("kl3m-tokenizers", 9)
def test_training_is_the_same_again_with_any_number_of_threads(tmp_path: Path) -> None:
    """Twice, and in a process with another number of threads; ties (many, in 3 texts) are broken alike."""
    (tmp_path / "a.txt").write_text("\n".join(code()[:3]), encoding="utf-8")
    program = (
        "import sys; from tokenmill.text import CustomTokens, train_domain_bpe;"
        "t = train_domain_bpe(files=[sys.argv[1]], vocab_size=1024, custom_tokens=CustomTokens.only());"
        "print(t.backend_tokenizer.to_str())"
    )
    found = set()
    for threads in ("1", "4"):
        env = {**os.environ, "RAYON_NUM_THREADS": threads}
        made = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "a.txt")], env=env, capture_output=True, check=True
        )
        found.add(made.stdout.strip())
    again = train_domain_bpe(files=[tmp_path / "a.txt"], vocab_size=1024, custom_tokens=NONE)
    found.add(again.backend_tokenizer.to_str().encode())
    assert len(found) == 1


@pytest.mark.prop("kl3m-tokenizers", 7)
def test_more_merges_never_need_more_tokens() -> None:
    counts = []
    for size in (300, 400, 700, 1024):
        made = train_domain_bpe(code(), size, custom_tokens=NONE, pad_to_power_of_two=False)
        tokens = sum(len(ids(made, text)) for text in code())
        characters = sum(map(len, code()))
        assert tokens / characters >= 1 / TokenBytes.of(made).max_length
        counts.append(tokens)
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] < counts[0]


@pytest.mark.prop("kl3m-tokenizers", 10)
def test_uncased() -> None:
    made = train_domain_bpe(code(), 4096, lowercase=True)
    for text in ("ABC", "<DIV> (IV) Null", "Ünïcode ÉTÉ"):
        assert ids(made, text) == ids(made, text.lower())


def test_padding() -> None:
    assert [bpe.power_of_two(n) for n in (1, 2, 3, 4096, 4097)] == [1, 2, 4, 4096, 8192]
    assert bpe.fillers({"  "}, 4) == ["\n\n", "   ", "\n\n\n", "    "]
    assert bpe.to_bytes(bpe.to_symbols("é 天\n")) == "é 天\n".encode()


def test_what_is_refused() -> None:
    with pytest.raises(LimitError, match=r"leaves -\d+ merges after 13 special"):
        train_domain_bpe(code(), 512)
    with pytest.raises(LimitError, match=r"supports only \d+ tokens with max_chars=2"):
        train_char_bpe(["a short text"], 4096, 2)
    assert len(train_char_bpe(["a short text"], 300, 2, short="fill")) == 512
    for bad in (
        lambda: train_domain_bpe([], 1024, custom_tokens=NONE),
        lambda: train_domain_bpe([""], 1024, custom_tokens=NONE),
        lambda: train_domain_bpe("text", 1024, custom_tokens=NONE),
        lambda: train_domain_bpe(None, 1024, custom_tokens=NONE),
        lambda: train_domain_bpe(["a"], 1024, normalization="nfx"),  # type: ignore[arg-type]
        lambda: train_domain_bpe(["a"], 1024, min_frequency=0),
        lambda: train_domain_bpe(["a"], 1024, special_tokens=("<a>", "<a>")),
        lambda: train_char_bpe(["a"], 1024, 0),
        lambda: train_char_bpe(["a"], 1024, unit="byte"),  # type: ignore[arg-type]
    ):
        with pytest.raises(LimitError):
            bad()


def test_marks_in_the_training_text_are_text() -> None:
    made = train_domain_bpe(["<|end|> a <|end|> b " * 20], 512, custom_tokens=NONE, short="fill")
    assert made.convert_ids_to_tokens(list(range(13))) == list(KL3M_SPECIALS)
    assert ids(made, "<|end|>") == [1]


def test_bad_records_are_counted_and_too_many_refused(tmp_path: Path) -> None:
    good = ["text"] * 400
    stream = CorpusStream([*good, None, "a\ud800b", 3])
    assert len(list(stream)) == 400
    assert sum(stream.counts.bad.values()) == 3
    with pytest.raises(LimitError, match="1% of 103"):
        list(CorpusStream([*good[:100], None, None, 3]))
    with pytest.raises(LimitError, match="bad records"):
        train_domain_bpe([*good[:50], None], 300, custom_tokens=NONE)
    file = tmp_path / "a.jsonl.gz"
    lines = [json.dumps({"text": f"é {n}"}) for n in range(900)] + ["{not json", '{"no": 1}']
    file.write_bytes(gzip.compress("\n".join(lines).encode()))
    stream = CorpusStream(files=[file])
    assert "".join(stream) == "".join(f"é {n}" for n in range(900))
    assert dict(stream.counts.bad) == {"of invalid JSON": 1, 'without "text"': 1}
    some = list(CorpusStream(files=[f"{file}:0.2"], seed=1))
    assert 120 <= len(some) <= 250
    assert (
        some == list(CorpusStream(files=[f"{file}:0.2"], seed=1)) != list(CorpusStream(files=[f"{file}:0.2"], seed=2))
    )
    for rate in ("0", "1.5", "-1"):
        with pytest.raises(LimitError, match="sampling rate"):
            CorpusStream(files=[f"{file}:{rate}"])
    with pytest.raises(LimitError, match="exists"):
        CorpusStream(files=[tmp_path / "none.txt"])


def test_long_lines_are_cut_at_white_space(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    text = "word  " * 40_000 + "x" * 200_000
    file.write_text(text, encoding="utf-8")
    found = list(CorpusStream(files=[file]))
    assert "".join(found) == text
    assert max(map(len, found)) <= 2 * 65_536
    assert list(pieces("ab cd  ef", 5)) == ["ab", " cd", "  ef"] or "".join(pieces("ab cd  ef", 5)) == "ab cd  ef"
    # Cutting where white space begins changes no word that is counted.
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole = code()[0]
    parts = [word for piece in pieces(whole, 500) for word, _ in cut.pre_tokenize_str(piece)]
    assert parts == [word for word, _ in cut.pre_tokenize_str(whole)]


def test_a_special_token_is_not_a_custom_token_as_well() -> None:
    lines = [f"def f{n}(x): return {n}" for n in range(60)]
    made = train_domain_bpe(lines, 400, custom_tokens=CustomTokens.only(code=("<|pad|>", "return ")), short="fill")
    added = made.backend_tokenizer.get_added_tokens_decoder()
    assert [t.content for t in added.values()].count("<|pad|>") == 1
    assert added[2].special
    assert made.pad_token_id == 2


def test_records_of_nothing_are_an_empty_corpus() -> None:
    with pytest.raises(LimitError, match="the corpus is empty"):
        train_domain_bpe(["", ""], 400, custom_tokens=NONE)
