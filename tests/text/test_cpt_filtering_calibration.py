"""Thresholds: what they promise on texts they have not seen, and how they are kept."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from tests.text import vocabularies
from tests.text.test_cpt_filtering import prose
from tokenmill.errors import LimitError
from tokenmill.text import OBFUSCATORS, Calibration, CPTFilter
from tokenmill.text._scripts import SCRIPTS
from tokenmill.text.cpt_filtering import auroc, best_threshold, caesar, finite_quantile, small

LETTERS = "abcdefghijklmnopqrstuvwxyz ABCXYZ"


@pytest.mark.prop("cpt-filtering", 7)
@pytest.mark.parametrize("name", list(OBFUSCATORS))
@given(text=st.text(max_size=40), words=st.lists(st.text("ABCZ019.,?@", min_size=1, max_size=6), max_size=5))
def test_encodings_give_the_text_back(name: str, text: str, words: list[str]) -> None:
    one = OBFUSCATORS[name]
    if one.covers == "any":
        assert one.decode(one.encode(text)) == text
    if one.covers in ("any", "ascii"):
        assert (
            one.decode(one.encode(text.encode("ascii", "ignore").decode())) == text.encode("ascii", "ignore").decode()
        )
    if one.covers == "morse" and words:
        assert one.decode(one.encode(" ".join(words))) == " ".join(words)
    assert (one.covers == "none") == (name == "leet")


def test_encodings_are_what_they_are_called() -> None:
    found = {name: one.encode("Hi, abc xyz") for name, one in OBFUSCATORS.items()}
    assert len(found) == 15
    assert found["caesar-3"] == "Kl, def abc"
    assert found["rot13"] == "Uv, nop klm"
    assert found["atbash"] == "Sr, zyx cba"
    assert found["reverse"] == "zyx cba ,iH"
    assert found["reverse-words"] == ",iH cba zyx"
    assert found["base64"] == "SGksIGFiYyB4eXo="
    assert found["hex"] == "48692c206162632078797a"
    assert found["binary"].startswith("01001000 01101001 ")
    assert found["morse"] == ".... .. --..-- / .- -... -.-. / -..- -.-- --.."
    assert found["percent"].startswith("%48%69%2C%20")
    assert found["spaced"] == "H i ,   a b c   x y z"
    assert found["zero-width"] == "\u200b".join("Hi, abc xyz")
    assert found["fullwidth"] == "Ｈｉ，　ａｂｃ　ｘｙｚ"
    assert OBFUSCATORS["leet"].encode("leet is so bAd") == "1337 15 50 84d"
    assert caesar(29).name == "caesar-3"
    with pytest.raises(KeyError):
        OBFUSCATORS["rot14"]
    with pytest.raises(LimitError, match="k = 'x'"):
        caesar("x")  # type: ignore[arg-type]


@pytest.mark.prop("cpt-filtering", 7)
def test_every_encoding_lowers_the_score_and_another_order_of_words_does_not() -> None:
    made = CPTFilter(vocabularies.o200k())
    texts = [text[:100] for text in prose()[:300]]
    plain = made.score_batch(texts).mean()
    assert plain > 4.2
    lower = {name: plain - made.score_batch([one.encode(t) for t in texts]).mean() for name, one in OBFUSCATORS.items()}
    assert min(lower.values()) >= 1.5, lower
    turned = [" ".join(reversed(text.split(" "))) for text in texts]
    assert abs(plain - made.score_batch(turned).mean()) < 0.5


@pytest.mark.prop("cpt-filtering", 8)
@pytest.mark.parametrize("form", ["buckets", "normal"])
@pytest.mark.parametrize("windows", [(), (10, 20)])
@pytest.mark.filterwarnings("ignore:CPTFilter.calibrate")
def test_false_alarms_on_texts_not_seen(form: Any, windows: tuple[int, ...]) -> None:
    rng = random.Random(3)
    words = [word for text in prose() for word in text.split() if word.isascii()]
    texts = [" ".join(rng.choices(words, k=rng.randrange(4, 60))) for _ in range(5000)]
    alpha = 0.03
    made = CPTFilter(vocabularies.deepseek(), windows=windows).calibrate(texts[:2500], fpr=alpha, form=form)
    flagged = int(made.decide(texts[2500:]).flagged.sum())
    low, high = binom.ppf([0.005, 0.995], 2500, alpha)
    assert flagged <= high
    if not windows:  # with windows the error is shared out, and the sum of the shares is an upper bound
        assert flagged >= low


def test_the_quantile_keeps_its_promise_for_every_number_of_texts() -> None:
    # Of n + 1 exchangeable scores without ties, the last is below the k-th smallest of the others k times in n + 1.
    for n, alpha in itertools.product(range(1, 60), (0.01, 0.05, 0.1, 0.25, 0.5)):
        scores = np.arange(n + 1.0)
        below = 0
        for new in range(n + 1):
            threshold = finite_quantile(np.delete(scores, new), alpha)
            below += threshold is not None and scores[new] < threshold
        assert below / (n + 1) <= alpha + 1e-12
        assert (below + 1) / (n + 1) > alpha - 1e-12  # no more careful than it must be
    assert finite_quantile(np.arange(98.0), 0.01) is None
    assert finite_quantile(np.arange(99.0), 0.01) == 0


@pytest.mark.prop("cpt-filtering", 6)
@given(
    clean=st.lists(st.integers(0, 12), min_size=1, max_size=12),
    encoded=st.lists(st.integers(0, 12), min_size=1, max_size=12),
)
def test_the_supervised_threshold_is_the_best_one(clean: list[int], encoded: list[int]) -> None:
    a, b = np.array(clean, float), np.array(encoded, float)

    def accuracy(threshold: float) -> float:
        return ((b < threshold).mean() + 1 - (a < threshold).mean()) / 2

    found, said = best_threshold(a, b)
    candidates = [accuracy(x + 0.5) for x in range(-1, 13)]
    if max(candidates) > 0.5:
        assert accuracy(found) == pytest.approx(max(candidates))
        assert said == pytest.approx(max(candidates))
    if b.max() < a.min():
        assert said == 1
        assert found == (b.max() + a.min()) / 2
    pairs = [1.0 if y < x else 0.5 if y == x else 0.0 for x in clean for y in encoded]
    assert auroc(a, b) == pytest.approx(np.mean(pairs))


def test_ties_go_to_the_widest_gap() -> None:
    found, accuracy = best_threshold(np.array([2.0, 9.0, 10.0]), np.array([1.0, 3.0]))
    assert (found, accuracy) == (6.0, pytest.approx(5 / 6))
    found, _ = best_threshold(np.array([2.0, 5.0]), np.array([1.0, 4.0]))
    assert found in (1.5, 4.5)
    found, _ = best_threshold(np.array([2.0, 8.0]), np.array([1.0, 4.0]))
    assert found == 6.0


@pytest.mark.filterwarnings("ignore:CPTFilter.calibrate")
def test_labelled_texts_give_one_threshold_between_them() -> None:
    clean = [text[:100] for text in prose()[:300]]
    encoded = [caesar(5).encode(text) for text in clean[:150]]
    made = CPTFilter(vocabularies.o200k(), windows=()).calibrate(clean[:150], encoded)
    assert made.calibration is not None
    group = made.calibration.groups["latin"]
    assert group.tau is not None
    assert group.auroc is not None
    assert group.auroc > 0.98
    texts = clean[150:]
    balanced = 1 - made.decide(texts).flagged.mean()
    balanced += made.decide([OBFUSCATORS["base64"].encode(text) for text in texts]).flagged.mean()
    assert balanced / 2 > 0.94
    assert made.flag(texts[0]).threshold == group.tau


def test_normal_form_by_hand() -> None:
    tokenizer = vocabularies.cl100k()
    texts = [text for text in prose() if text.isascii()][:200]
    made = CPTFilter(tokenizer, windows=()).calibrate(texts, fpr=0.1, form="normal")
    assert made.calibration is not None
    group = made.calibration.groups["latin"]
    ids = [tokenizer.encode(" ".join(text.split())) for text in texts]
    sizes = np.array([len(tokenizer.tokens[i] or b"") for text in ids for i in text], dtype=float)
    assert group.mu == pytest.approx(sizes.mean())
    assert group.sigma == pytest.approx(sizes.std())
    verdict = made.flag(texts[0])
    m = len(ids[0])
    assert verdict.threshold == pytest.approx(group.mu - group.z * np.sqrt(group.sigma**2 / m + group.omega**2))
    flagged = made.decide(texts).flagged.mean()
    assert 0.05 < flagged <= 0.1


def test_too_few_texts_are_said_and_longer_ones_need_no_normal_law() -> None:
    with pytest.warns(UserWarning, match="latin: 60 clean texts, 399 are needed") as said:
        made = CPTFilter(vocabularies.cl100k(), windows=(10, 20, 40)).calibrate(prose()[:60], fpr=0.0025)
    assert any("no threshold for windows of [10, 20, 40]" in str(w.message) for w in said)
    assert made.calibration is not None
    group = made.calibration.groups["latin"]
    assert group.buckets == (None,) * 4
    assert group.windows == {}
    assert group.z == pytest.approx(2.807, abs=1e-3)


@pytest.mark.filterwarnings("ignore:CPTFilter.calibrate")
def test_saving_and_loading(tmp_path: Path) -> None:
    made = CPTFilter(vocabularies.cl100k()).calibrate(prose()[:500], fpr=0.05).calibration
    assert made is not None
    file = tmp_path / "c.json"
    made.save(file)
    assert Calibration.load(file) == made
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]
    data = json.loads(file.read_text())
    for change in ({"schema": 7}, {"fpr": 2}, {"form": "x"}, {"groups": {"klingon": data["groups"]["latin"]}}):
        file.write_text(json.dumps(data | change))
        with pytest.raises(LimitError):
            Calibration.load(file)
    data["groups"]["latin"]["mu"] = float("nan")
    for text in (json.dumps(data), "{", "[]", "null"):
        file.write_text(text)
        with pytest.raises(LimitError):
            Calibration.load(file)
    with pytest.raises(LimitError, match="a file that"):
        Calibration.load(tmp_path / "none.json")


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "c.json"
    Calibration(fingerprint="a", fpr=0.01).save(file)
    before = file.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="full"):
        Calibration(fingerprint="b", fpr=0.01).save(file)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]


@pytest.mark.parametrize("value", [0, 1, -0.1, 2, float("nan"), True, "x"])
def test_shares_outside_are_refused(value: Any) -> None:
    with pytest.raises(LimitError, match="fpr = "):
        Calibration(fingerprint="a", fpr=value)
    with pytest.raises(LimitError, match="alpha = "):
        finite_quantile(np.arange(9.0), value)
    with pytest.raises(LimitError, match="no scores"):
        auroc(np.zeros(0), np.ones(1))
    with pytest.raises(LimitError, match="no scores"):
        best_threshold(np.ones(1), np.zeros(0))


def test_a_language_with_shorter_tokens_lowers_its_scripts_threshold() -> None:
    plain = replace(small(), windows=(), threshold=None)
    rng = random.Random(0)
    # Two "languages" of one script: common words, and letters that the vocabulary has no merges for.
    common = [" ".join(rng.choices(["the", "the", "tent"], k=12)) for _ in range(900)]
    rare = [" ".join(rng.choices(["qzx", "xqz", "the", "zzq", "qq"], k=12)) for _ in range(120)]
    together = plain.calibrate([*common, *rare], fpr=0.05)
    apart = plain.calibrate({"rare": rare, "common": common}, fpr=0.05)  # the lowest counts, not the last
    assert apart.calibration is not None
    assert {"latin", "latin/common", "latin/rare"} <= set(apart.calibration.groups)
    assert together.decide(rare).flagged.mean() > 0.05 >= apart.decide(rare).flagged.mean()
    assert apart.decide(common).flagged.mean() <= 0.05
    # A text is held to the lowest threshold of its script.
    scores = apart.score_batch(rare)
    limit = apart.calibration.thresholds(np.full(1, SCRIPTS.index("latin"), np.uint8), np.array([45]), np.array([30]))
    assert limit[0] <= np.quantile(scores, 0.06)


def test_a_language_with_few_texts_is_named_and_has_no_thresholds_of_its_own() -> None:
    texts = {"many": ["the tent in the heat"] * 100, "few": ["qzx xqz the tent"] * 5}
    with pytest.warns(UserWarning, match="few: no thresholds of its own, which need 99 clean texts of a script, not 5"):
        made = replace(small(), windows=(), threshold=None).calibrate(texts)
    assert made.calibration is not None
    assert "latin/many" in made.calibration.groups
    assert "latin/few" not in made.calibration.groups
