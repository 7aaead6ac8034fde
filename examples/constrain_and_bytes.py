"""Constrained text and exact bytes on Gemma 3 270M: a date that is a date, no letter e, and a word cut in the middle.

python examples/constrain_and_bytes.py
"""

from __future__ import annotations

import tokenmill as tm


def no_letter_e(text: str) -> bool:
    """Any function from text to bool is a constraint."""
    return "e" not in text.lower()


def main() -> None:
    model, tokenizer = tm.models.load("gemma-3-270m", dtype="bfloat16", packed=True)
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}

    print("A date, by a regular expression:")
    date = tm.decode.regex(r"(19|20)\d\d-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])\n")
    decoder = tm.decode.AWRS(date, tokenizer, n_particles=8, boundary="prefix", seed=0)
    inputs = tokenizer("12 May 1995 is 1995-05-12\n3 March 2021 is 2021-03-03\n4 July 1976 is ", return_tensors="pt")
    model.generate(**inputs, custom_generate=decoder, max_new_tokens=11, **sampling)
    for text, p in list(decoder.sequences.posterior().items())[:3]:
        print(f"  {p:.2f}  {text.decode()!r}")
    print(f"  {decoder.trace.median_checks:.0f} checks a token, where masking needs {len(tokenizer):,}")

    print("No letter e, by a Python function:")
    decoder = tm.decode.AWRS(tm.decode.predicate(no_letter_e), tokenizer, boundary="prefix", seed=1)
    inputs = tokenizer("The old man went to", return_tensors="pt")
    out = model.generate(**inputs, custom_generate=decoder, max_new_tokens=16, **sampling)
    print(f"  {tokenizer.decode(out[0, inputs['input_ids'].shape[1] :])}")

    print("A prompt that ends inside a word:")
    text = "import os\n\ndef read_file(path):\n    with open(pa"
    inputs = tokenizer(text, return_tensors="pt")
    plain = model.generate(**inputs, do_sample=False, max_new_tokens=8)
    print("  tokens as they are: " + repr(tokenizer.decode(plain[0, inputs["input_ids"].shape[1] :])))
    lm = tm.decode.ByteLM(model, tokenizer)
    print("  exact bytes:        " + repr(lm.generate(text, max_new_bytes=24, temperature=0).text))
    state = lm.start(text)
    print(f"  probability of the letter t: {state.logprobs()[ord('t')].exp():.3f}")


if __name__ == "__main__":
    main()
