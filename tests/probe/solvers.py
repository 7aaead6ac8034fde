"""Who answers in the tests: a solver that reads the prompt, guesses at random, and a tiny model with its tokenizer."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable, Iterable
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tokenmill.models import tiny
from tokenmill.probe import Example, oracle


def solving(examples: Iterable[Example]) -> Callable[[str], str]:
    """A function from prompt to right answer."""
    answers = {example.prompt: oracle(example) for example in examples}

    def oracle_of_tests(prompt: str) -> str:
        return answers[prompt]

    return oracle_of_tests


def guess(example: Example, rng: random.Random) -> str:
    """As many values of the haystack as are asked for, at chance."""
    values = list(json.loads(example.haystack).values())
    said = rng.sample(values, len(example.values))
    return said[0] if len(said) == 1 else json.dumps(said)


def characters() -> PreTrainedTokenizerFast:
    """A tokenizer of single characters: 64 tokens, and what it does not know is one of them."""
    letters = string.digits + string.ascii_lowercase + '-{}":, \n.*JSON[]&EFKTAVG'
    names = ["<pad>", "<unk>", *dict.fromkeys(letters)][:64]
    made = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", unk_token="<unk>")


def tiny_llama() -> tuple[Any, PreTrainedTokenizerFast]:
    """A random model of 512 positions and the tokenizer of characters."""
    return tiny("llama", vocab=64), characters()
