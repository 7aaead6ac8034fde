from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from tokenmill import models
from tokenmill.errors import LimitError, TokenmillError, UnsupportedError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    place = tmp_path / "toy"
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(place)
    models.tiny("gemma3", seed=7).save_pretrained(place)
    return place


def test_a_local_folder_is_loaded_as_it_was_saved(folder: Path) -> None:
    model, tokenizer = models.load(str(folder))
    ids = torch.tensor([tokenizer("w5 w9 w63")["input_ids"]])
    assert ids.tolist() == [[5, 9, 63]]
    assert not model.training
    assert model.config._attn_implementation == "sdpa"
    assert not models.is_packed(model)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, models.tiny("gemma3", seed=7)(ids).logits)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_dtype_attention_and_packing_are_what_was_asked_for(folder: Path, dtype: object) -> None:
    model, _ = models.load(str(folder), dtype=dtype, attn="eager", packed=True)  # pyright: ignore[reportArgumentType]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"
    assert models.is_packed(model)


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("gemma-3-27m", {}, "Did you mean gemma-3-270m"),
        ("python_target", {}, "Did you mean python-target"),
        ("not a model", {}, "one of .*digits-llava, .*gemma-3-270m"),
        ("gemma-3-270m", {"dtype": "float23"}, "Did you mean float32"),
        ("gemma-3-270m", {"dtype": torch.int8}, "dtype = 'int8'"),
    ],
)
def test_unknown_names_answer_with_the_nearest(name: str, given: dict[str, str], words: str) -> None:
    with pytest.raises(LimitError, match=words):
        models.load(name, **given)  # pyright: ignore[reportArgumentType]


def test_an_unknown_attention_is_refused(folder: Path) -> None:
    with pytest.raises(LimitError, match="Did you mean sdpa"):
        models.load(str(folder), attn="spda")


def test_packing_is_for_the_cpu(folder: Path) -> None:
    with pytest.raises(UnsupportedError, match="packed layers run on the CPU, not on meta"):
        models.load(str(folder), packed=True, device="meta")


def test_a_folder_without_a_model_says_so_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="cannot load") as caught:
        models.load(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_an_id_that_cannot_be_reached_says_so_in_one_line() -> None:
    code = (
        "from tokenmill import models, errors\n"
        "for name in ('nobody/nothing-at-all', 'xyzzy'):\n"
        "    try:\n"
        "        models.load(name)\n"
        "    except errors.TokenmillError as error:\n"
        "        print(type(error).__name__, str(error).count(chr(10)))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True
    )
    assert run.stdout.split("\n")[:2] == ["UnsupportedError 0", "LimitError 0"], run.stderr


def test_names_and_facts_need_no_torch() -> None:
    code = (
        "import sys, tokenmill.models as m\n"
        "facts = [m.info(name) for name in m.names()]\n"
        "assert all(f['licence'] and f['parameters'] and f['size_mb'] for f in facts), facts\n"
        "assert 'gemma-3-270m' in m.names() and dir(m)\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_facts_about_an_unknown_model_are_refused() -> None:
    with pytest.raises(TokenmillError, match="Did you mean gemma-3-270m"):
        models.info("gemma3-270m")
    with pytest.raises(AttributeError, match="nonsense"):
        models.nonsense  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]
