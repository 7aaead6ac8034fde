"""Write the tables of README.md and docs/ from the JSON lines in benchmarks/results/.

python benchmarks/tables.py           # rewrite what stands between `<!-- table: NAME -->` and `<!-- end -->`
python benchmarks/tables.py --check   # exit 1 when a page is out of date
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
KINDS = ("code", "prose", "json")
PLACE = re.compile(r"(<!-- table: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
Line = dict[str, Any]


def lines(name: str) -> list[Line]:
    """The good lines of a results file."""
    path = RESULTS / f"{name}.jsonl"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [line for line in map(json.loads, text.splitlines()) if line["status"] == "ok"]


def label(line: Line) -> str:
    """A method and its settings, as the command line takes them."""
    return ":".join([line["method"], *(f"{k}={str(v).lower()}" for k, v in line["params"].items())])


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    head = list(head)
    text = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*text, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def by_method(found: list[Line]) -> dict[str, dict[str, Line]]:
    """label -> kind of data -> line."""
    out: dict[str, dict[str, Line]] = {}
    for line in found:
        out.setdefault(label(line), {})[line["data"]["kind"]] = line
    return out


def provenance(found: list[Line]) -> str:
    """The command and the machine behind a table."""
    if not found:
        return ""
    env, commands = found[-1]["env"], dict.fromkeys(line["cmd"] for line in found)
    threads = "1 thread" if env["threads"] == 1 else f"{env['threads']} threads"
    shown = "\n".join(f"    {command}" for command in commands)
    return f"\n{env['cpu']}, {threads}, torch {env.get('torch')}, transformers {env.get('transformers')}:\n\n{shown}\n"


def speed() -> str:
    """Speed against packed plain by kind of text, interleaved medians."""
    found = lines("speed")

    def cell(line: Line) -> str:
        low = min(1 / item["ratio"] for item in line["items"])
        middle, least, most = (1 / x for x in line["ratio"]["ms_p50"])
        return f"{middle:.2f}x ({most:.2f}-{least:.2f}), worst prompt {low:.2f}x" if label(line) != "plain" else "1"

    rows = [
        [
            f"`{name}`",
            *(cell(kinds[k]) for k in KINDS),
            *(f"{kinds[k]['cost'].get('tokens_per_call', 1):.2f}" for k in KINDS),
        ]
        for name, kinds in by_method(found).items()
    ]
    head = ["method", *(f"{k}, speed" for k in KINDS), *(f"{k}, tokens a call" for k in KINDS)]
    return table(head, rows) + provenance(found)


def short() -> str:
    """The result table of the README: speed on three kinds of text."""
    rows = []
    for name, kinds in by_method(lines("speed")).items():
        same = sum(kinds[k]["quality"]["identical"] for k in KINDS) / len(KINDS)
        ratios = [f"{1 / kinds[k]['ratio']['ms_p50'][0]:.2f}x" for k in KINDS]
        rows.append([f"`{name}`", *ratios, f"{kinds['code']['cost'].get('tokens_per_call', 1):.2f}", f"{same:.0%}"])
    return table(["method", *KINDS, "tokens a call (code)", "outputs identical to plain's (bfloat16)"], rows)


def profile() -> str:
    """Milliseconds of a forward by new positions."""
    found = lines("profile")
    if not found:
        return ""
    head = ["weights", *(str(n) for n in found[0]["positions"])]
    return table(head, ([line["weights"], *(f"{ms:.0f}" for ms in line["ms"])] for line in found)) + provenance(found)


def accepted() -> str:
    """Mean accepted tokens by tree."""
    found = lines("accepted")
    rows = [
        [
            f"`{label(line)}`",
            "hot" if line["settings"]["warm"] else "cold",
            f"{line['cost']['tokens_per_call']:.2f}",
            f"{line['cost']['positions'] / line['cost']['model_calls']:.0f}",
        ]
        for line in found
        if line["method"] != "plain"
    ]
    return table(["method", "table", "tokens a call", "positions a call, prompt included"], rows) + provenance(found)


def exactness() -> str:
    """Share of outputs that are plain's, by dtype."""
    found = lines("exactness")
    rows = [[line["dtype"], line["variant"], str(line["n"]), f"{line['quality']['identical']:.1%}"] for line in found]
    return table(["dtype", "variant", "prompts", "identical to plain"], rows) + provenance(found)


def spectr() -> str:
    """Block efficiency by K and L."""
    found = [line for line in lines("spectr") if line["method"] == "spectr"]
    cells = {(line["params"]["num_drafts"], line["params"]["draft_len"]): line for line in found}
    lengths, drafts = sorted({length for _, length in cells}), sorted({k for k, _ in cells})
    if not cells:
        return ""
    rows = []
    for k in drafts:
        row = [str(k)]
        for length in lengths:
            mine, one = (cells[key]["cost"]["tokens_per_call"] for key in ((k, length), (1, length)))
            pace = 1 / cells[k, length]["ratio"]["ms_p50"][0]
            row += [f"{mine:.2f} ({mine / one - 1:+.0%})", f"{pace:.2f}x"]
        rows.append(row)
    head = ["K"] + [
        text for n in lengths for text in (f"L = {n}, tokens a target call (against K = 1)", f"L = {n}, speed")
    ]
    return table(head, rows) + provenance(found)


def pair() -> str:
    """What the recipe of the shipped pair took and reached, from the assets' own cards."""
    rows = []
    for name in ("python-target", "python-draft"):
        card = json.loads((ROOT / "src" / "tokenmill" / "assets" / name / "card.json").read_text(encoding="utf-8"))
        rows.append(
            [
                f"`{name}`",
                f"{card['weights']:,}",
                f"{card['steps']:,}",
                f"{card['cpu_seconds'] / 60:.0f} minutes on one core",
                f"{card['held_out_bits_per_byte']:.2f}",
            ]
        )
    return table(["model", "weights", "steps", "training", "held-out bits per byte"], rows)


def awrs_toy() -> str:
    """KL to the posterior by particles, and the mean weight against the normaliser."""
    found = lines("awrs-toy")
    cells = {(line["method"], line["n_particles"]): line for line in found if line["what"] == "kl"}
    if not cells:
        return ""
    counts = sorted({n for _, n in cells})
    names = {"auto": "AWRS", "paper": "AWRS, the paper's estimator", "lcd": "masked sampling (LCD)"}
    rows = []
    for method, title in names.items():
        shown = [cells[method, n] for n in counts]
        rows.append([title, *(f"{c['kl']:.3f} / {c['kl_of_mean_law']:.4f}" for c in shown)])
    head = ["KL to the posterior: one run's estimate / law of the estimates' mean", *(f"N = {n}" for n in counts)]
    weights = [line for line in found if line["what"] == "weight"]
    mean = table(
        ["estimator, 4 particles", "mean weight", "normaliser", "standard errors apart"],
        (
            [
                w["method"],
                f"{w['mean_weight']:.4f} ({w['runs']:,} runs)",
                f"{w['normaliser']:.4f}",
                f"{w['errors_away']:+.1f}",
            ]
            for w in weights
        ),
    )
    return table(head, rows) + "\n" + mean + provenance(found)


def constrain() -> str:
    """Checks, own time and quality by kind of constraint."""
    found = lines("constrain")
    kinds = list(dict.fromkeys(line["data"]["kind"] for line in found))
    rows = []
    for kind in kinds:
        here = {label(line): line for line in found if line["data"]["kind"] == kind}
        for name, line in here.items():
            cost, quality = line["cost"], line["quality"]
            checks = f"{cost['checks_per_token']:,.1f}" if name not in ("plain", "llguidance") else ""
            if name == "rerank":
                checks = ""
            if "checks_median" in cost:
                checks += f" (median {cost['checks_median']:.0f})"
            exact = f"{quality['exact']:.0%}" if "exact" in quality else ""
            good = [f"{quality['valid']:.0%}", exact] if name != "mask" else ["", ""]
            asking = f"{cost['constraint_ms_per_step']:,.2f}" if name != "plain" else ""
            times = [asking, f"{cost['own_ms_per_step']:,.1f}", f"{cost['ms_p50']:,.0f}"]
            rows.append([kind, f"`{name}`", checks, *times, *good])
    head = [
        "constraint",
        "method",
        "checks a token",
        "constraint ms a step",
        "own ms a step",
        "ms a text",
        "valid",
        "right line",
    ]
    return table(head, rows) + provenance(found)


def awrs_peer() -> str:
    """Ours and the authors' library on one machine."""
    found = lines("awrs-peer")
    rows = [
        [line["predicate"], line["side"], f"{line['ms_p50']:,.0f}", f"{line['ms_per_token_p50']:.1f}",
         f"{line['checks_per_token']:.1f}"] for line in found if line["what"] == "speed"
    ]  # fmt: skip
    means = [line for line in found if line["what"] == "mean weight"]
    text = "; ".join(f"{m['side']} {m['value']:.2e} ± {m['standard_error']:.2e}" for m in means)
    head = ["predicate", "side", "ms a call", "ms a token", "checks a token"]
    note = f"\nMean weight of {means[0]['runs']} runs (estimates of one normaliser): {text}.\n" if means else ""
    return table(head, rows) + note + provenance(found)


def _cuts(name: str, quality: tuple[str, ...], titles: tuple[str, ...]) -> str:
    found = lines(name)
    rows = []
    for line in found:
        shown = [f"{line['quality'][q]:.3f}" for q in quality]
        cost, ours = line["cost"], line["method"] == "byte-level-probabilities"
        leak = f"{cost['leak']:.1%}" if ours and "leak" in cost else ""
        rows_per_byte = f"{cost['rows_per_byte']:.2f}" if "rows_per_byte" in cost else ""
        counts = [f"{cost['model_calls']:.1f}", f"{cost['positions']:.0f}", rows_per_byte, leak]
        rows.append([line["data"]["kind"], f"`{label(line)}`", str(line["n"]), *shown, *counts])
    head = ["cut", "method", "cuts", *titles, "model calls", "positions, prompt included", "rows a byte", "leak"]
    return table(head, rows) + provenance(found)


def bytes_() -> str:
    """Bits of the next byte by cut."""
    return _cuts("bytes", ("bits", "top1"), ("bits", "likeliest byte is right"))


def complete() -> str:
    """The rest of the line."""
    return _cuts("complete", ("exact", "similarity"), ("exact", "edit similarity"))


def ensemble() -> str:
    """Two models and their average."""
    return _cuts("ensemble", ("bits", "top1"), ("bits", "likeliest byte is right"))


def _by_kind(name: str, quality: str, first: str, title: str, digits: int) -> str:
    """One measure: a row a method, a column a kind of text."""
    found = lines(name)
    kinds = list(dict.fromkeys(line["data"]["kind"] for line in found))
    rows = []
    for label_, by_kind in by_method(found).items():
        shown = [f"{by_kind[k]['quality'][quality]:.{digits}f}" if k in by_kind else "" for k in kinds]
        rows.append([f"`{label_}`", *shown])
    return table([first, *(f"{kind}, {title}" for kind in kinds)], rows) + provenance(found)


def tokenize() -> str:
    """Tokens a character of held-out text, by vocabulary."""
    return _by_kind("tokenize", "tokens_per_char", "vocabulary", "tokens a character", 4)


def transplant() -> str:
    """Bits a byte under another tokenizer, without training."""
    return _by_kind("transplant", "bits_per_byte", "rows", "bits a byte", 3)


def guard(name: str = "guard") -> str:
    """What is flagged of clean and of encoded texts, and how well the score tells them apart."""
    found = [line for line in lines(name) if line["method"] != "plain"]
    methods = by_method(found)
    rows = []
    for kind in dict.fromkeys(line["data"]["kind"] for line in found):
        shown = []
        for by_kind in methods.values():
            quality = by_kind[kind]["quality"] if kind in by_kind else {}
            share = quality.get("hit_rate", quality.get("false_positives"))
            score = f", AUROC {quality['auroc']:.4f}" if "auroc" in quality else ""
            shown.append("" if share is None else f"{share:.0%}{score}")
        n = next(line["n"] for line in found if line["data"]["kind"] == kind)
        rows.append([kind, str(n), *shown])
    return table(["texts", "n", *(f"`{name}`, flagged" for name in methods)], rows) + provenance(found)


def guard_tokens() -> str:
    """The same for texts of 20 tokens or more."""
    return guard("guard-tokens")


def stochastok() -> str:
    """Tokens a second of the expansion, beside the loop over a list."""
    rows = []
    for line in lines("stochastok-speed"):
        if line["what"] == "expand":
            rate, against = line["tokens_a_second"], line["against_loop"]
            loop = f"{rate['loop'] / 1e6:.1f} M" if "loop" in rate else ""
            times = f"{against:.1f}x" if against is not None else ""
            shown = [f"{line['growth']:+.1%}", f"{rate['arrays'] / 1e6:.1f} M", loop, times]
            rows.append([line["tokenizer"], f"{line['p']:g}", f"{line['rows']:,} x {line['tokens']:,}", *shown])
    head = ["vocabulary", "p", "rows x tokens", "growth", "tokens a second", "loop over a list", "faster"]
    return table(head, rows) + provenance(lines("stochastok-speed"))


def shorten() -> str:
    """Tokens saved and cosine kept, by kind and method."""
    rows = []
    for line in lines("shorten"):
        if line["method"] != "plain":
            q = line["quality"]
            shown = [f"{q['cut']:.1%}", f"{q['cosine']:.3f}", f"{q['recall']:.1%}"]
            rows.append([line["data"]["kind"], f"`{label(line)}`", *shown])
    head = ["texts", "method", "tokens saved", "cosine", "own text nearest"]
    return table(head, rows) + provenance(lines("shorten"))


def vocabulary_training() -> str:
    """Boundaries under noise, and the time of a training beside the bare trainer's."""
    found = lines("vocabulary-training")
    noise = [
        [
            f"`{line['vocabulary']}`",
            f"{line['jaccard']:.3f}",
            f"{line['edits_per_error']:.2f}",
            f"{line['length_ratio']:.3f}",
        ]
        for line in found
        if line["what"] == "noise"
    ]
    times = [
        [f"{line['vocab_size']:,}", f"{line['megabytes']:.1f} MB", f"{line['ratio']:.2f}x"]
        for line in found
        if line["what"] == "time"
    ]
    first = table(["vocabulary", "Jaccard of boundaries", "changed tokens an error", "length"], noise)
    return first + "\n" + table(["vocabulary", "file", "time to the bare trainer's"], times) + provenance(found)


def guard_languages() -> str:
    """Clean texts of each language that are flagged, with thresholds by language."""
    found = [line for line in lines("guard-languages") if line["method"] == "cpt-filtering"]
    rows = []
    for line in found:
        kind, q = line["data"]["kind"], line["quality"]
        if "false_positives" in q:
            rows.append([kind, str(line["n"]), f"{q['false_positives']:.1%}"])
        else:
            rows.append([kind, str(line["n"]), f"{q['hit_rate']:.1%}, AUROC {q['auroc']:.4f}"])
    return table(["texts", "n", "flagged"], rows) + provenance(found)


def transplant_steps() -> str:
    """Bits a byte after some steps on the rows alone, by seed."""
    found = lines("transplant-steps")
    kinds = list(dict.fromkeys(line["data"]["kind"] for line in found))
    seeds = sorted({line["seed"] for line in found})
    rows = []
    for name in dict.fromkeys(label(line) for line in found):
        own = {
            (line["data"]["kind"], line["seed"]): line["quality"]["bits_per_byte"]
            for line in found
            if label(line) == name
        }
        for kind in kinds:
            values = [own[kind, seed] for seed in seeds if (kind, seed) in own]
            shown = [f"{value:.3f}" for value in values]
            rows.append([f"`{name}`", kind, *shown, f"{sum(values) / len(values):.3f}"])
    return table(["rows", "texts", *(f"seed {seed}" for seed in seeds), "mean"], rows) + provenance(found)


def words() -> str:
    """Bits per byte and next words at equal compute."""
    found = lines("words")
    rows = []
    for line in found:
        q = line["quality"]
        names = ("next_word", *(f"next_word_{name}" for name in ("unseen", "rare", "some", "frequent")))
        shown = [f"{q[name]:.1%}" if name in q else "" for name in names]
        first = [line["data"]["kind"], f"`{label(line)}`", f"{line['cost']['steps']:.0f}"]
        rows.append([*first, f"{q['bits_per_byte']:.3f}", *shown])
    head = ["texts", "method", "steps", "bits per byte", "next word", "unseen", "1 to 5", "6 to 50", "more"]
    return table(head, rows) + provenance(found)


def large_vocabulary() -> str:
    """Recall of the index, and its time beside the exact product."""
    found = lines("large-vocabulary")
    rows = []
    for line in found:
        if line["what"] == "search":
            ms, shown = line["ms"], [f"{line['recall_1']:.1%}", f"{line['recall_20']:.1%}"]
            times = [f"{ms['index']:.1f} ms", f"{ms['exact']:.1f} ms", f"{line['faster']:.1f}x"]
            rows.append([line["index"], f"{line['setting']}={line['value']:,}", *shown, *times])
    head = ["search", "setting", "recall@1", "recall@20", "index", "exact product", "faster"]
    return table(head, rows) + provenance(found)


def guard_speed() -> str:
    """Megabytes a second of the filter and of the encoding, by vocabulary."""
    found = lines("guard-speed")
    ways = ("encode_batch", "encode_batch_fast", "filter", "filter with windows")
    rows = []
    for line in found:
        rate, over = line["mb_a_second"], line["overhead"]
        names = [f"{way} over {base}" for base in ways[:2] for way in ways[2:]]
        shown = [f"{over[name]:+.1%}" if name in over else "" for name in names]
        rows.append([f"`{line['vocabulary']}`", *(f"{rate[way]:.1f}" if way in rate else "" for way in ways), *shown])
    head = ["vocabulary", *(f"{way}, MB/s" for way in ways), "filter over batch", "with windows"]
    head += ["filter over fast", "with windows"]
    return table(head, rows) + provenance(found)


def supertokens() -> str:
    """Tokens that supertokens need fewer than other vocabularies, by kind of text."""
    found = lines("supertokens")
    rows = [
        [line["kind"], f"{line['chars']:,}", *(f"{value:+.1%}" for value in line["fewer"].values())] for line in found
    ]
    head = ["held-out texts", "characters", *(f"fewer than `{name}`" for name in (found[0]["fewer"] if found else ()))]
    return table(head, rows) + provenance(found)


def lm() -> str:
    """A model trained on a method's tokens beside its twin, by seed."""
    found = lines("lm")
    names = ("bits_per_byte", "langgame", "first_letter", "last_letter", "length_r2")
    rows = []
    for line in found:
        q = line["quality"]
        kinds = [f"{name.removeprefix('langgame_')} {q[name]:.2f}" for name in q if name.startswith("langgame_")]
        rows.append([f"`{label(line)}`", *(f"{q[name]:.3f}" for name in names), ", ".join(kinds)])
    titles = ("bits per byte", "questions", "first letter", "last letter", "length, R²", "by kind of question")
    return table(["tokens", *titles], rows) + provenance(found)


def hypernetworks() -> str:
    """What trained networks save and keep on held-out texts, beside the mean of pieces."""
    cards = [line["card"] for line in lines("recipe-cards") if line["method"] == "dynamic-tokenization"]
    rows = []
    for card in cards:
        for place, q in card["held_out"].items():
            texts, boundary, level = place.split(", ")
            if level in ("0.5", "1"):
                shown = [f"{q['cut']:.1%}", f"{q['network']:.3f}", f"{q['mean']:.3f}"]
                model = card["summary"].split(" for ")[-1].rstrip(".")
                rows.append([f"`{model}`", texts, boundary, level, *shown])
    head = ["model", "held-out texts", "boundary", "target_reduction", "tokens saved", "network", "mean of pieces"]
    runs = [f"{card['steps']:,} steps, {card['seconds'] / 60:.0f} minutes:\n\n    {card['command']}" for card in cards]
    return table(head, rows) + "\n" + "\n\n".join(runs) + "\n"


def word_pooled() -> str:
    """What the recipe of a word-pooled model reached."""
    cards = [line["card"] for line in lines("recipe-cards") if line["method"] == "learn-your-tokens"]
    rows = [
        [
            f"{card['weights'] / 1e6:.1f} M",
            f"{card['steps']:,}",
            f"{card['seconds'] / 60:.0f}",
            f"{card['held_out_bits_per_byte']:.3f}",
        ]
        for card in cards
    ]
    runs = "\n".join(f"    {card['command']}" for card in cards)
    return table(["weights", "steps", "minutes", "held-out bits per byte"], rows) + f"\n{runs}\n"


KEEPS = (0.5, 0.25, 0.125)
DIGITS = ("digits-llava", "digits-qwen2.5-vl")


def _pruners(model: str) -> dict[str, dict[float, list[Line]]]:
    """Method and settings -> share kept -> lines of all kinds and seeds."""
    out: dict[str, dict[float, list[Line]]] = {}
    for line in lines("vqa"):
        if line["model"] == model:
            params = dict(line["params"])
            params.pop("seed", None)
            tokens = params.pop("max_tokens", None)
            keep = params.pop("keep", None if tokens is None else tokens / 64)
            out.setdefault(label({**line, "params": params}), {}).setdefault(keep or 1.0, []).append(line)
    return out


def _right(found: list[Line], kind: str | None = None) -> tuple[float, int]:
    """Share of right answers over lines, and number of questions."""
    mine = [line for line in found if kind in (None, line["data"]["kind"])]
    n = sum(line["n"] for line in mine)
    return sum(line["n"] * line["quality"]["accuracy"] for line in mine) / n, n


def _interval(share: float, n: int) -> str:
    """A share with its 95 % interval (Wilson), in percent."""
    z2 = 1.96**2 / n
    middle = (share + z2 / 2) / (1 + z2)
    half = (share * (1 - share) * z2 + z2 * z2 / 4) ** 0.5 / (1 + z2)
    return f"{share:.1%} ({100 * (middle - half):.1f}-{100 * (middle + half):.1f})"


def _mean_cost(found: list[Line], name: str) -> float:
    return sum(line["cost"][name] for line in found) / len(found)


def _curves(model: str) -> str:
    """Accuracy of every method by share kept, and what a quarter of the tokens costs."""
    found = _pruners(model)
    if not found:
        return ""
    plain = found.pop("plain")[1.0]
    keeps = sorted({keep for by_keep in found.values() for keep in by_keep}, reverse=True)
    middle = keeps[len(keeps) // 2]
    kinds = list(dict.fromkeys(line["data"]["kind"] for line in plain))
    share, n = _right(plain)
    first = ["plain", *["" for _ in keeps], *(f"{_right(plain, kind)[0]:.1%}" for kind in kinds), "100%", "100%"]
    first[1] = f"{_interval(share, n)} with all"
    rows = [[*first, "100%", "1"]]
    for name, by_keep in found.items():
        cells = [_interval(*_right(by_keep[k])) if k in by_keep else "" for k in keeps]
        here = by_keep.get(middle)
        if here is None:
            rows.append([f"`{name}`", *cells, *["" for _ in kinds], "", "", "", ""])
            continue
        ratios = sorted(line["ratio"]["ms_p50"][0] for line in here)
        rows.append(
            [
                f"`{name}`",
                *cells,
                *(f"{_right(here, kind)[0]:.1%}" for kind in kinds),
                f"{_mean_cost(here, 'kept'):.0%}",
                f"{_mean_cost(here, 'flops') / _mean_cost(plain, 'flops'):.0%}",
                f"{_mean_cost(here, 'kv_bytes') / _mean_cost(plain, 'kv_bytes'):.0%}",
                f"{ratios[len(ratios) // 2]:.2f}",
            ]
        )
    head = ["method", *(f"{keep:.1%} kept" for keep in keeps), *(f"{kind} at {middle:.0%}" for kind in kinds)]
    head += [f"tokens a layer at {middle:.0%}", "prefill FLOPs", "KV bytes", "time"]
    return table(head, rows) + provenance([line for line in lines("vqa") if line["model"] == model])


def _against_random(slug: str) -> str:
    """A method's accuracy on both models, beside the untouched model and random tokens."""
    rows = []
    for model in DIGITS:
        found = _pruners(model)
        for name in [name for name in found if name.split(":")[0] == slug]:
            for keep in sorted(found[name], reverse=True):
                (ours, n), (chance, m) = _right(found[name][keep]), _right(found["random"][keep])
                spread = 196 * (ours * (1 - ours) / n + chance * (1 - chance) / m) ** 0.5
                gain = f"{100 * (ours - chance):+.1f} ± {spread:.1f} points"
                left = f"{ours / _right(found['plain'][1.0])[0]:.1%}"
                rows.append([model, f"`{name}`", f"{keep:.1%}", _interval(ours, n), left, gain])
    head = ["model", "method", "kept", "accuracy", "of the untouched model's", "against random tokens"]
    return table(head, rows)


def vqa_llava() -> str:
    """Digits, LLaVA."""
    return _curves("digits-llava")


def vqa_qwen() -> str:
    """Digits, Qwen2.5-VL."""
    return _curves("digits-qwen2.5-vl")


def vqa_pages() -> str:
    """Pages, LLaVA."""
    return _curves("pages-llava")


def vision_models() -> str:
    """What the recipes of the vision-language models took and reached, from the assets' own cards."""
    rows = []
    for name in (*DIGITS, "pages-llava"):
        card = json.loads((ROOT / "src" / "tokenmill" / "assets" / name / "card.json").read_text(encoding="utf-8"))
        reached = ", ".join(f"{kind} {share:.1%}" for kind, share in card["held_out_accuracy"].items())
        took = f"{card['seconds'] / 60:.0f} minutes, {card['threads']} thread{'s' if card['threads'] > 1 else ''}"
        rows.append([f"`{name}`", f"{card['weights']:,}", f"{card['steps']:,}", took, reached])
    return table(["model", "weights", "steps", "training", "held-out accuracy"], rows)


def prune_selection() -> str:
    """Selections beside one product of all pairs."""
    rows = []
    for line in lines("prune-speed"):
        if line["what"] == "selection":
            shown = [f"{line['ms']:.1f} ms", f"{line['to_product']:.2f}x", f"{line['peak_to_product']:.2f}x"]
            rows.append([str(line["keep"]), line["name"], *shown])
    head = ["kept of 2,880", "selection", "time", "to the product's time", "to the product's memory"]
    return table(head, rows) + provenance([line for line in lines("prune-speed") if line["what"] == "selection"])


def prune_prefill() -> str:
    """Prefill of a model of 110 M weights by method."""
    rows = []
    for line in lines("prune-speed"):
        if line["what"] == "prefill":
            times = [f"{line[name]:.0f}" for name in ("tower_ms", "select_ms", "forward_ms")]
            shown = [f"{line['faster']:.2f}x", f"{line['fewer_flops']:.2f}x", f"{line['to_formula']:.2f}"]
            rows.append([str(line["rows"]), line["name"], f"{line['plain_ms']:.0f}", *times, *shown])
    head = ["prompts", "method", "plain, ms", "tower, ms", "choosing, ms", "forward, ms"]
    head += ["prefill faster", "fewer FLOPs", "decoder's speed to its FLOPs"]
    return table(head, rows) + provenance([line for line in lines("prune-speed") if line["what"] == "prefill"])


def entropy_speed() -> str:
    """Matrix entropy by the small and by the large matrix."""
    rows = [
        [f"{line['ms']:.1f}", f"{line['covariance_ms']:.1f}", f"{line['faster']:.1f}x", str(line["same_ranking"])]
        for line in lines("prune-speed")
        if line["what"] == "entropy"
    ]
    head = ["Gram matrix of 32 heads, ms", "covariance of 128, ms", "faster", "same ranking"]
    return table(head, rows) + provenance([line for line in lines("prune-speed") if line["what"] == "entropy"])


def zoo_estimators() -> str:
    """ZOO-Prune's three estimators."""
    rows = []
    for line in lines("prune-speed"):
        if line["what"] == "estimators":
            times = [f"{line[f'{name}_ms']:.0f}" for name in ("fd", "jvp", "frobenius")]
            ranks = [f"{line['spearman_fd_frobenius']:.3f}", f"{line['spearman_fd_jvp']:.4f}"]
            rows.append([f"1,024 to {line['width']:,}", *times, *ranks])
    head = ["projector", "fd, ms", "jvp, ms", "frobenius, ms", "ranks, fd and frobenius", "ranks, fd and jvp"]
    return table(head, rows) + provenance([line for line in lines("prune-speed") if line["what"] == "estimators"])


def hisa_speed() -> str:
    """The hierarchical indexer beside the flat one."""
    rows = []
    for line in lines("hisa-speed"):
        ms, faster, scored = line["ms"], line["faster"], line["keys_scored"]
        names = [name for name in ms if name != "flat"]
        cells = [f"{ms[n]:.1f} ms, {faster[n]:.1f}x, {scored['flat'] / scored[n]:.1f}x fewer" for n in names]
        rows.append([f"{line['tokens']:,}", str(line["queries"]), f"{ms['flat']:.1f} ms", *cells])
    head = ["tokens", "queries", "flat", "m = 16: time, faster, keys scored", "m = 64"]
    return table(head, rows) + provenance(lines("hisa-speed"))


def long_context() -> str:
    """What methods recall and predict that read a part of a long prompt."""
    rows = []
    found = lines("long-context")
    kinds = list(dict.fromkeys(line["data"]["kind"] for line in found))
    for name, by_kind in by_method(found).items():
        cells = []
        for kind in kinds:
            quality = by_kind[kind]["quality"]
            mass = f", mass {quality['mass']:.0%}" if "mass" in quality else ""
            cells.append(f"{quality['bits']:.3f} bits{mass}" if "bits" in quality else f"{quality['recall']:.0%}")
        # A method that acts in decoding alone reads everything in the prefill, so texts tell its share.
        shares = [line["cost"].get("density", 1.0) for line in by_kind.values() if "bits" in line["quality"]]
        rows.append([f"`{name}`", *cells, f"{sum(shares) / len(shares):.0%}"])
    return table(["method", *kinds, "keys read, texts"], rows) + provenance(found)


def _share(line: Line) -> str:
    low, high = line["interval"]
    return f"{line['accuracy']:.1%} ({100 * low:.1f}-{100 * high:.1f})"


def recall_models() -> str:
    """What the recipe of the recall models took and reached, from the assets' own cards."""
    cards = []
    for name in ("recall", "recall-dsa"):
        path = ROOT / "src" / "tokenmill" / "assets" / name / "card.json"
        if path.is_file():
            cards.append(json.loads(path.read_text(encoding="utf-8")))
    lengths = list(cards[0]["held_out_accuracy"]["single"])
    rows = []
    for card in cards:
        took = f"{card['steps']:,} steps, {card['cpu_seconds_of_last_run'] / 60:.0f} minutes of one core"
        for task, reached in card["held_out_accuracy"].items():
            cells = [f"{reached[length]:.1%}" if length in reached else "" for length in lengths]
            rows.append([f"`{card['name']}`", f"{card['weights']:,}", took, task, *cells])
    return table(["model", "weights", "training", "question", *(f"{int(n):,} tokens" for n in lengths)], rows)


def recall_beyond() -> str:
    """Recall beyond the trained length, by way of reading."""
    found = lines("recall-beyond")
    lengths = list(dict.fromkeys(line["tokens"] for line in found))
    rows = []
    for steps, way in dict.fromkeys((line["steps"], line["way"]) for line in found):
        mine = {line["tokens"]: line for line in found if (line["steps"], line["way"]) == (steps, way)}
        asked = "one value" if steps == 1 else f"thread of {steps}"
        rows.append([asked, way, *(_share(mine[n]) if n in mine else "" for n in lengths)])
    return table(["question", "attention", *(f"{n:,} tokens" for n in lengths)], rows) + provenance(found)


def hisa_recall() -> str:
    """Recall on the model with a trained indexer."""
    found = lines("hisa-recall")
    lengths = list(dict.fromkeys(line["tokens"] for line in found))
    rows = []
    for way in dict.fromkeys(line["way"] for line in found):
        mine = {line["tokens"]: line for line in found if line["way"] == way}
        rows.append([way, *(_share(mine[n]) if n in mine else "" for n in lengths)])
    head = ["keys of a query", *(f"{n:,} tokens" for n in lengths)]
    return table(head, rows) + provenance(found)


def token_sparsity() -> str:
    """Loss by share of tokens kept and by layers."""
    found = lines("token-sparsity")
    rows = []
    for line in found:
        if line["what"] == "loss":
            low, high = line["interval"]
            shown = ", ".join(str(layer) for layer in line["which"])
            seeds = ", ".join(f"{value:+.3f}" for value in line["by_seed"])
            more = f"{line['more']:+.4f} ({low:+.4f} to {high:+.4f})"
            rows.append([line["layers"], shown, f"{line['tau']:g}", f"{line['density']:.0%}", more, seeds])
    head = ["chosen", "layers", "tau", "tokens a head keeps", "nats more than dense", "by set of texts"]
    return table(head, rows) + provenance(found)


def needle_tokens() -> str:
    """Tokens of a pair of the haystack."""
    found = lines("needle-tokens")
    rows = [[f"`{x['tokenizer']}`", f"{x['tokens_per_pair']:.1f}", f"{x['chars_per_token']:.2f}"] for x in found]
    return table(["tokenizer", "tokens a pair", "characters a token"], rows) + provenance(found)


def attention_mass() -> str:
    """What attention the chosen keys hold, beside what the best ones hold."""
    found = [line for line in lines("attention-mass") if line["what"] == "mass"]
    rows = []
    for line in found:
        cells = [f"{value:.3f}" for value in line["by_layer"].values()]
        short = [f"{value:.1%}" for value in line["short_of_oracle"].values()]
        rows.append([line["way"], *cells, f"{line['mean_short']:.1%}", ", ".join(short)])
    layers = [f"layer {layer}" for layer in found[0]["by_layer"]] if found else []
    head = ["keys chosen by", *layers, "short of the exact top keys", "by layer"]
    return table(head, rows) + provenance(found)


def chunk_overlap() -> str:
    """How far rankings of other texts name the same chunks."""
    found = [line for line in lines("attention-mass") if line["what"] == "overlap"]
    tips = list(dict.fromkeys(line["n_tip"] for line in found))
    rows = [["chance", *(f"{next(x['chance'] for x in found if x['n_tip'] == tip):.2f}" for tip in tips)]]
    for text in dict.fromkeys(line["text"] for line in found):
        by_tip = {line["n_tip"]: line["overlap"] for line in found if line["text"] == text}
        rows.append([text, *(f"{by_tip[tip]:.2f}" for tip in tips)])
    return table(["ranking of", *(f"{tip} chunks" for tip in tips)], rows) + provenance(found)


def _attend_speed(slug: str) -> str:
    found = [line for line in lines("attend-speed") if line["method"] == slug]
    rows = []
    for line in found:
        if "ways" not in line:
            continue
        dense = line["ways"]["dense"]["ms_p50"]
        for name, way in line["ways"].items():
            if name == "dense":
                continue
            faster = way.get("faster", way["faster_p50"])
            more = [f"{way['reused']:.0%}"] if slug == "tokenselect" else []
            row = [f"{line['tokens']:,}", name, f"{dense:.1f}", f"{way['ms_p50']:.1f}", f"{faster:.2f}x", *more]
            rows.append(row)
    more = ["selections reused"] if slug == "tokenselect" else []
    text = table(["tokens", "way", "dense, ms", "method, ms", "faster", *more], rows)
    held = [line for line in found if line["what"] == "memory"]
    cells = [[x["way"], f"{x['tokens']:,}", f"{x['peak_mib']:.0f}", f"{x['formula_mib']:.0f}"] for x in held]
    for line in found:
        if line["what"] == "reuse":
            layers = next(iter(line["shares"].values()))
            shares = [[theta, *(f"{x:.0%}" for x in by.values())] for theta, by in line["shares"].items()]
            text += "\n" + table(["reused at theta", *(f"layer {layer}" for layer in layers)], shares)
    return text + "\n" + table(["way", "tokens", "peak, MiB", "formula, MiB"], cells) + provenance(found)


def kvpress_peer() -> str:
    """StreamingLLM and SnapKV beside kvpress's."""
    found = lines("kvpress-peer")
    sides: dict[tuple[str, float], dict[str, Line]] = {}
    for line in found:
        sides.setdefault((line["press"], line["ratio"]), {})[line["side"]] = line
    rows = []
    for (press, ratio), both in sides.items():
        peer, ours = both["kvpress"], both["tokenmill"]
        bits = [f"{peer['bits']:.3f}", f"{ours['bits']:.3f}", f"{ours['worst_apart']:.3f}"]
        rows.append([press, f"{1 - ratio:.0%}", *bits, f"{peer['ms_p50']:.1f}", f"{ours['ms_p50']:.1f}"])
    head = ["method", "kept", "kvpress, bits", "ours, bits", "furthest apart", "kvpress, ms a step", "ours, ms a step"]
    return table(head, rows) + provenance(found)


def tokenselect_speed() -> str:
    """TokenSelect in decoding beside sdpa."""
    return _attend_speed("tokenselect")


def fasa_speed() -> str:
    """FASA in decoding beside sdpa."""
    return _attend_speed("fasa")


def tsa_speed() -> str:
    """Token Sparse Attention in a prefill beside sdpa."""
    return _attend_speed("token-sparse-attention")


_TUNED = ("n", "tau", "f", "gamma", "threshold", "temperature")  # settings that are chosen on validation prompts
Key = tuple[str, str]  # a rule with its other settings, and its tuned ones


def unmasked(given: list[Line], model: str, block: int | None) -> dict[str, dict[Key, list[Line]]]:
    """split -> rule and setting -> lines of a model, one for each kind and seed."""
    found: dict[str, dict[Key, list[Line]]] = {"validation": {}, "test": {}}
    for line in given:
        params = line["params"]
        if line["status"] != "ok" or line["model"] != model or line["settings"]["block"] != block:
            continue
        rest = [f"{k}={str(v).lower()}" for k, v in params.items() if k not in _TUNED]
        rule = ":".join([line["method"], *rest])
        tuned = ":".join(f"{k}={v}" for k, v in params.items() if k in _TUNED)
        found[line["settings"]["split"]].setdefault((rule, tuned), []).append(line)
    return found


def _over(found: list[Line], where: str, name: str, kind: str | None = None) -> float:
    """The mean of a figure over seeds and kinds, or over the seeds of one kind."""
    values = [line[where].get(name, 0.0) for line in found if kind in (None, line["data"]["kind"])]
    return sum(values) / len(values)


def chosen(found: dict[str, dict[Key, list[Line]]], loss: float) -> dict[str, Key]:
    """rule -> its setting with the fewest passes among those within ``loss`` of plain, on validation prompts."""
    tried = found["validation"]
    least = _over(tried["plain", ""], "quality", "accuracy") - loss
    best: dict[str, Key] = {}
    for rule, _tuned in tried:
        mine = {key: part for key, part in tried.items() if key[0] == rule}
        good = {k: p for k, p in mine.items() if _over(p, "quality", "accuracy") >= least}
        if good:
            best[rule] = min(good, key=lambda key: _over(good[key], "cost", "passes"))
        else:
            best[rule] = max(mine, key=lambda key: _over(mine[key], "quality", "accuracy"))
    return best


def _rules(model: str, block: int | None) -> str:
    """Rules on a model, each at its chosen setting, on test prompts."""
    found = unmasked(lines("diffuse"), model, block)
    if not found["validation"]:
        return ""
    plain = found["test"]["plain", ""]
    kinds = list(dict.fromkeys(line["data"]["kind"] for line in plain))
    rows, used = [], []
    for rule, key in chosen(found, 0.01).items():
        part = found["test"].get(key, [])
        if not part:
            continue
        used += part
        passes, places = (_over(part, "cost", name) for name in ("passes", "positions"))
        seeds = {line["seed"] for line in part}
        each = [_over([x for x in part if x["seed"] == s], "quality", "accuracy") for s in sorted(seeds)]
        spread = f" ({min(each):.1%} to {max(each):.1%})" if len(each) > 1 else ""
        rows.append(
            [
                f"`{':'.join(x for x in (rule, key[1]) if x)}`",
                f"{_over(part, 'quality', 'accuracy'):.1%}{spread}",
                *(
                    f"{_over(part, 'quality', 'accuracy', k):.1%} / {_over(part, 'cost', 'passes', k):.2f}"
                    for k in kinds
                ),
                f"{passes:.2f} ({_over(plain, 'cost', 'passes') / passes:.1f}x fewer)",
                f"{places:,.0f}",
                f"{_over(part, 'cost', 'flops') / 1e6:,.0f}",
                f"{_over(part, 'quality', 'same'):.1%}",
            ]
        )
    head = ["rule", "accuracy", *(f"{k}: accuracy / passes" for k in kinds), "passes", "places fed"]
    head += ["million operations", "same text as one token a pass"]
    return f"`{model}`\n\n" + table(head, rows) + provenance(used)


def learn2pd() -> str:
    """Learn2PD beside the rules without training, on the model with long answers."""
    return _rules("diffusion-long", None)


def unmasking_policies() -> str:
    """Learned policies beside the rules without training, with the whole answer as one block."""
    return "\n".join(filter(None, (_rules(model, 0) for model in ("diffusion-mixed", "diffusion-hard"))))


def _by_spec(found: list[Line], *settings: str) -> dict[str, list[Line]]:
    """label, and the settings that are named -> lines of all kinds and seeds."""
    out: dict[str, list[Line]] = {}
    for line in found:
        more = [str(line["settings"][name]) for name in settings if line["settings"][name] is not None]
        out.setdefault(" ".join([f"`{label(line)}`", *more]), []).append(line)
    return out


def guided() -> str:
    """Guides of several strengths beside the best threshold, on the task with several right answers."""
    given = lines("guided")
    if not given:
        return ""
    tried = _by_spec([line for line in given if line["settings"]["split"] == "validation"])
    least = _over(tried["`plain`"], "quality", "accuracy") - 0.01
    good = {name: part for name, part in tried.items() if _over(part, "quality", "accuracy") >= least}
    best = min(good, key=lambda name: _over(good[name], "cost", "passes"))
    test = _by_spec([line for line in given if line["settings"]["split"] == "test"], "guide")
    rows, reference = [], _over(test[best], "cost", "passes")
    for name, part in test.items():
        if name.startswith("`threshold") and name != best:
            continue
        if name.startswith("`plain`") and name != "`plain`":
            continue  # measured again with every guide
        passes, flops = (_over(part, "cost", cost) for cost in ("passes", "flops"))
        row = [name.replace("diffusion-mixed-guide-", "guide "), f"{_over(part, 'quality', 'accuracy'):.1%}"]
        row += [f"{passes:.2f}", f"{1 - passes / reference:+.0%}"]
        rows.append([*row, f"{flops / 1e6:,.1f}"])
    head = ["rule", "accuracy", "passes", "fewer than the threshold", "million operations"]
    return table(head, rows) + provenance(given)


def frozen() -> str:
    """What windows and frozen prefixes feed, one token a pass."""
    given = lines("frozen")
    if not given:
        return ""
    parts = _by_spec(given)
    rows = []
    for name, part in parts.items():
        fed = _over(part, "cost", "positions")
        fewer = _over(parts["`plain`"], "cost", "positions") / fed
        row = [name, f"{_over(part, 'quality', 'accuracy'):.1%}", f"{_over(part, 'cost', 'passes'):.1f}", f"{fed:,.0f}"]
        rows.append([*row, f"{fewer:.1f}x", f"{_over(part, 'quality', 'same'):.1%}"])
    head = ["policy", "accuracy", "passes", "places fed", "fewer", "same text as without a cache"]
    return table(head, rows) + provenance(given)


def composed() -> str:
    """Filters, end-of-text prediction and caches together, in time."""
    given = lines("composed")
    if not given:
        return ""
    rows = []
    for name, part in _by_spec(given, "rows").items():
        faster = sum(1 / line["ratio"]["ms_p50"][0] for line in part) / len(part)
        row = [name.rsplit(" ", 1)[0], name.rsplit(" ", 1)[1], f"{_over(part, 'quality', 'accuracy'):.1%}"]
        rows.append(
            [*row, f"{_over(part, 'cost', 'passes'):.2f}", f"{_over(part, 'cost', 'positions'):,.0f}", f"{faster:.1f}x"]
        )
    head = ["rule and cache", "rows", "accuracy", "passes", "places fed", "faster"]
    return table(head, rows) + provenance(given)


def diffusion_passes() -> str:
    """Milliseconds of a pass with windows, by length."""
    found = [line for line in lines("diffusion-speed") if line["method"] == "window-diffusion"]
    if not found:
        return ""
    rows = []
    for line in found:
        if line["what"] == "pass":
            cells = [f"{ms:.0f} ({line['positions'][size]:,.0f})" for size, ms in line["ms"].items()]
            rows.append([line["way"], *cells, f"{line['longest_to_shortest']:.2f}x"])
    whole = [
        [f"{x['size']:,}", f"{x['ms']:.0f}", f"{x['full_ms']:.0f}", f"{x['faster']:.1f}x"]
        for x in found
        if x["what"] == "whole answer"
    ]
    sizes = [f"{int(size):,} places: ms a pass (fed)" for x in found[:1] for size in x["ms"]]
    first = table(["refreshes", *sizes, "longest to shortest"], rows)
    return (
        first
        + "\n"
        + table(["whole answer of", "ms a pass", "everything, ms a pass", "faster"], whole)
        + provenance(found)
    )


def diffusion_prefixes() -> str:
    """Milliseconds of a pass with frozen prefixes at a long prompt."""
    found = [line for line in lines("diffusion-speed") if line["what"] == "prefix"]
    if not found:
        return ""
    rows = [
        [x["cache"], f"{x['ms']:.0f}", f"{x['positions']:,.0f}", f"{x['faster']:.1f}x", f"{x['worst']:.1f}x"]
        for x in found
    ]
    return table(["cache", "ms a pass", "places a pass", "faster", "slowest repeat"], rows) + provenance(found)


def diffusion_models() -> str:
    """What the recipe of the masked diffusion models and of their guides took and reached, from the assets' cards."""
    rows = []
    for folder in sorted((ROOT / "src" / "tokenmill" / "assets").glob("diffusion-*")):
        card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
        if "held_out" not in card:
            continue
        held = {k: v for k, v in card["held_out"].items() if k not in ("each_kind", "seed")}
        reached = ", ".join(f"{k} {v:.2f}" if k.startswith("bits") else f"{k} {v:.1%}" for k, v in held.items())
        rows.append([f"`{folder.name}`", f"{card['weights']:,}", f"{card['steps']:,}", reached])
    return table(["model", "weights", "steps", "held-out accuracy, one token a pass"], rows)


PRUNERS = (
    "divprune",
    "idpruner",
    "zoo-prune",
    "entropyprune",
    "information-horizon",
    "todre",
    "vflowopt",
    "token-correlation-compression",
)
_ATTEND = (
    hisa_speed,
    long_context,
    needle_tokens,
    attention_mass,
    chunk_overlap,
    kvpress_peer,
    tokenselect_speed,
    fasa_speed,
    tsa_speed,
    recall_models,
    recall_beyond,
    hisa_recall,
    token_sparsity,
)
_DIFFUSE = (
    learn2pd,
    unmasking_policies,
    diffusion_models,
    guided,
    frozen,
    composed,
    diffusion_passes,
    diffusion_prefixes,
)
_PRUNE = (
    vqa_llava,
    vqa_qwen,
    vqa_pages,
    vision_models,
    prune_selection,
    prune_prefill,
    entropy_speed,
    zoo_estimators,
)
_ALL = (awrs_toy, constrain, awrs_peer, complete, ensemble, speed, short, profile, accepted, exactness, spectr, pair)
_TEXT = (tokenize, transplant, guard, stochastok, shorten, words, large_vocabulary)
_MORE = (
    vocabulary_training,
    guard_languages,
    guard_tokens,
    transplant_steps,
    guard_speed,
    supertokens,
    lm,
    hypernetworks,
    word_pooled,
)
TABLES: dict[str, Callable[[], str]] = {
    one.__name__: one for one in (*_ALL, *_TEXT, *_MORE, *_PRUNE, *_ATTEND, *_DIFFUSE)
} | {"bytes": bytes_}
TABLES |= {f"vqa-{slug}": partial(_against_random, slug) for slug in PRUNERS}


def main() -> int:
    stale = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        old = page.read_text(encoding="utf-8")
        new = PLACE.sub(lambda m: m[1] + "\n" + TABLES[m[2]]() + "\n" + m[4], old)
        if new != old:
            stale.append(page.relative_to(ROOT).as_posix())
            if "--check" not in sys.argv:
                page.write_text(new, encoding="utf-8")
    sys.stdout.write("".join(f"{'out of date' if '--check' in sys.argv else 'rewritten'}: {name}\n" for name in stale))
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
