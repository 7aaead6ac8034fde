"""Text tokens: train a tokenizer, put it under a model, vary how training text is cut, and find hidden prompts.

python examples/text.py     # about a minute
"""

from __future__ import annotations

import codecs

import tokenmill as tm


def main() -> None:
    corpus = tm.corpora.load("python-stdlib")
    train = [record.text for record in corpus.split("train")][:300]
    held_out = corpus.split("test")[0].text[:2000]
    model, old = tm.models.load("python-target")

    print("A vocabulary for Python source:")
    new = tm.text.train_domain_bpe(train, vocab_size=4096, custom_tokens=tm.text.CustomTokens.only())
    print(f"  {len(old(held_out)['input_ids'])} tokens before, {len(new(held_out)['input_ids'])} after")

    print("Under a model that was trained with another one:")
    made = tm.text.transplant(model, old, new, "hash")
    print(f"  rows: {made.report.counts}")

    print("The same text, cut otherwise in each epoch of training:")
    table = tm.text.ExpansionTable.from_tokenizer(new)
    ids = new("return self.name")["input_ids"]
    for epoch in range(3):
        cut = tm.text.StochasTok(table, p=0.5, seed=epoch).expand(ids)
        print("  " + " | ".join(new.decode([i]) for i in cut))

    print("A prompt that is hidden in a cipher:")
    clean = [line for record in corpus.split("train") for line in record.text.splitlines() if len(line) > 40]
    guard = tm.text.CPTFilter(new).calibrate(clean)
    for text in (
        "def read(path): return open(path).read()",
        codecs.encode("def read(path): return open(path)", "rot13"),
    ):
        verdict = guard.flag(text)
        print(f"  {verdict.flagged!s:5}  {verdict.cpt:.2f} characters a token  {text}")


if __name__ == "__main__":
    main()
