"""Text tokens: all six methods of the family on the source of the standard library, one after another.

python examples/text.py     # about a minute
"""

from __future__ import annotations

import codecs

from transformers import LlamaConfig

import tokenmill as tm

SMALL = LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)


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

    print("Fewer tokens for an encoder, by merges of this batch alone:")
    lines = [line for line in held_out.splitlines() if line.strip()][:16]
    batch = tm.text.DynamicBPE(old).merge(lines)
    print(f"  {batch.cut:.0%} fewer: " + " | ".join(token.decode() for token in batch.tokens[0][1:]))

    print("A model that reads words and writes their bytes (here untrained):")
    words = tm.text.LearnYourTokens(num_prefix=1, dec_heads=4)
    segments = words.segmenter().words(lines[0])
    print("  " + " | ".join(segments))
    pooled = words.model(words.segmenter(), SMALL)
    print(f"  {pooled.eval().score(lines[:2])[0].bits_per_byte:.2f} bits per byte")


if __name__ == "__main__":
    main()
