"""Exact probabilities of bytes from a model of tokens: prompts that end anywhere, and models that share no vocabulary.

Phan et al., "Exact Byte-Level Probabilities from Tokenized Language Models for FIM-Tasks and Model Ensembles" (arXiv
2410.09303). A model that reads the tokens of a prompt which ends inside a word has learned that the longer token was
not used, and continues as if the word were over. Summing over all token sequences that may lie behind the bytes takes
this bias away, at one row of the model for each byte.

Use it where a prompt is cut by something else than the tokenizer: completion of identifiers and lines, infilling, URLs,
and to average models with different vocabularies. For ordinary continuation from whole words plain decoding is several
times cheaper, since a token has about four bytes.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal, cast

import torch

from tokenmill.catalog import Card, Paper
from tokenmill.decode._byte_lm import ByteEnsemble, ByteLM, FillInTheMiddle, Mode, check_mode, end_ids, view_of
from tokenmill.decode._byte_text import ByteText, choose_slot, shape_law
from tokenmill.decode._byte_view import ByteTokenizerView
from tokenmill.decode._byte_vocabulary import END, OTHER, SLOTS
from tokenmill.decode._covers import ByteTrace, Covers
from tokenmill.decode._request import Decoder, Request, Run, check_request, check_seed
from tokenmill.errors import TokenmillError, UnsupportedError, unknown_name

__all__ = [
    "CARD",
    "END",
    "OTHER",
    "SLOTS",
    "ByteEnsemble",
    "ByteLM",
    "ByteLevel",
    "ByteText",
    "ByteTokenizerView",
    "FillInTheMiddle",
    "shape_law",
]

CARD = Card(
    name="Exact byte-level probabilities",
    kind="decoder",
    paper=Paper(
        title="Exact Byte-Level Probabilities from Tokenized Language Models for FIM-Tasks and Model Ensembles",
        date="2024-10-11",
        arxiv="2410.09303",
        code="https://github.com/facebookresearch/Exact-Byte-Level-Probabilities-from-Tokenized-LMs",
    ),
    summary=(
        "Sums a model's token probabilities over every token sequence that may lie behind the bytes of a prompt. "
        "What comes out is the law of the next byte, for prompts that end anywhere and for models of any vocabulary."
    ),
    claim=(
        "The law of the next byte of the model restricted to valid encodings (mode 'valid') or of the model as it is "
        "(mode 'all', without a beam), at one row of the model for each byte in mode 'valid'."
    ),
    api=("ByteLevel", "ByteLM", "ByteEnsemble", "ByteTokenizerView", "ByteText", "FillInTheMiddle"),
    exact=False,
    trains=False,
    task="bytes",
    needs=frozenset({"tokenizer"}),
    works_with=("llama", "qwen2", "gemma3_text"),
    differs=(
        "mode 'valid' renormalises over the tokens that stay valid at every step, so that the lemma holds exactly; "
        "the authors' code masks without renormalising",
        "contexts are branches of one KV cache, so a byte costs one row even when the encoding of the text changes",
        "mode 'all', the marginal over all segmentations of a model that leaks mass to invalid encodings, is ours",
    ),
)

_LAG = 4  # tokens at the end that more bytes might still change, so they are not streamed yet


@dataclass(frozen=True)
class ByteLevel(Decoder[ByteTrace]):
    """A decoder for ``model.generate(..., custom_generate=decoder)`` that chooses bytes, one sequence at a time.

    The prompt's text may end anywhere. It is read from the last control token on; what comes out are the prompt's own
    tokens and, behind them, the encoding of the new bytes, so that the text is right and the prompt stays as it was.
    Temperature, top-k and top-p of `generate` act on the law of the next byte.

    Args:
        tokenizer: the model's tokenizer, or a `ByteTokenizerView`.
        mode, beam, lookback: see `ByteLM`.
        temperature_at: ``"token"`` tempers the model's own law inside the sums instead of the law of bytes.
        seed: of the draws; ``None`` uses torch's global generator.

    Raises:
        LimitError: an unknown mode, a beam below 1.
        UnsupportedError: a tokenizer that cannot be read as bytes.
    """

    tokenizer: Any
    _: KW_ONLY
    mode: Mode = "valid"
    beam: int | None = None
    lookback: int | None = None
    temperature_at: Literal["byte", "token"] = "byte"
    seed: int | None = None
    view: ByteTokenizerView = field(init=False, compare=False, repr=False)
    _run: Run[ByteTrace] = field(default_factory=lambda: Run(ByteTrace), init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_mode("ByteLevel", self.mode, self.beam, self.lookback)
        if self.temperature_at not in ("byte", "token"):
            raise unknown_name("ByteLevel", "temperature_at", str(self.temperature_at), ("byte", "token"))
        check_seed("ByteLevel", self.seed)
        object.__setattr__(self, "view", view_of(self.tokenizer))

    def _decode(self, request: Request) -> Any:
        with self._run.started("ByteLevel") as trace:
            try:
                check_request("ByteLevel", request)
                _check_bytewise(request)
                return _ByteRun(self, request, trace).result()
            except TokenmillError as error:
                error.partial = list(trace.tokens_so_far) if error.partial is None else error.partial
                raise


class _ByteRun:
    """One call: the state, the bytes, and the tokens that they make."""

    def __init__(self, decoder: ByteLevel, request: Request, trace: ByteTrace) -> None:
        self.decoder, self.request, self.trace = decoder, request, trace
        config = request.generation_config
        self.prompt = request.input_ids
        self.room = max(int(config.max_length or 0), self.prompt.shape[1]) - self.prompt.shape[1]
        self.greedy = not config.do_sample
        self.temperature = float(config.temperature or 1.0) if config.do_sample else 0.0
        self.top_k = int(config.top_k or 0) if config.do_sample else 0
        self.top_p = float(config.top_p or 1.0) if config.do_sample else 1.0
        self.ends = end_ids(config, decoder.tokenizer)
        self.streamed = 0

    def _start(self) -> Covers:
        decoder, request = self.decoder, self.request
        ids, mask = self.prompt[0], request.model_kwargs.get("attention_mask")
        if mask is not None and mask.dim() == 2:
            ids = ids[mask[0, : ids.shape[0]].bool()]  # padding is no part of the text
        tokens = ids.tolist()
        spelled = decoder.view.token_bytes.tokens
        controls = [at for at, token in enumerate(tokens) if token >= len(spelled) or spelled[token] is None]
        # Without a control token the first token is taken as it is: the model needs one to start from.
        cut = controls[-1] + 1 if controls else 1
        inner = self.temperature if decoder.temperature_at == "token" and not self.greedy else 1.0
        self.temperature = self.temperature if inner == 1.0 else 1.0
        lm = ByteLM(
            request.model,
            decoder.view,
            mode=decoder.mode,
            beam=decoder.beam,
            lookback=decoder.lookback,
            context=tokens[:cut],
            end=self.ends,
            temperature=inner,
            trace=self.trace,
        )
        return lm.start(decoder.view.token_bytes.join(tokens[cut:]))

    def result(self) -> Any:
        """Generate until the end token, the length or a criterion; what `generate` returns."""
        request = self.request
        if request.token_streamer is not None:
            request.token_streamer.put(self.prompt.cpu())
        ids: list[int] = []
        if self.room:
            state = self._start()
            while True:
                slot = choose_slot(
                    state.logprobs(),
                    temperature=self.temperature,
                    top_k=self.top_k,
                    top_p=self.top_p,
                    generator=request.generator,
                )
                if slot == END:
                    ids = [*ids, self.ends[0]]
                    break
                made = len(ids)
                ids = self.decoder.view.extend(ids, bytes([slot]))
                # The last token may still grow, so one more than asked for has to begin.
                if len(ids) > self.room or (len(ids) > made and self._stopped(ids[:-1])):
                    ids = ids[:-1]
                    break
                self._note(ids[:-1])
                state = state.push(slot)
        self._note(ids[: self.room], last=True)
        sequence = torch.cat([self.prompt, self.prompt.new_tensor([ids[: self.room]])], dim=1)
        if not request.generation_config.return_dict_in_generate:
            return sequence
        from transformers.generation.utils import GenerateDecoderOnlyOutput

        return GenerateDecoderOnlyOutput(sequences=cast("Any", sequence))

    def _stopped(self, ids: list[int]) -> bool:
        if not ids:
            return False
        sequence = torch.cat([self.prompt, self.prompt.new_tensor([ids])], dim=1)
        return bool(self.request.stopping_criteria(cast("Any", sequence), cast("Any", None)).all())

    def _note(self, ids: list[int], *, last: bool = False) -> None:
        """Keep what is there for whoever has to stop here, and show what will not change."""
        self.trace.tokens_so_far[:] = ids
        self.trace.tokens = len(ids)
        streamer = self.request.token_streamer
        settled = len(ids) if last else len(ids) - _LAG
        if streamer is not None and settled > self.streamed:
            streamer.put(torch.tensor(ids[self.streamed : settled]))
            self.streamed = settled


def _check_bytewise(request: Request) -> None:
    """Refuse what acts on single tokens, since tokens are not what is chosen."""
    shaping = {"TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper"}
    odd = sorted({type(p).__name__ for p in request.logits_processor} - shaping)
    if odd:
        raise UnsupportedError("ByteLevel", f"chooses bytes, and {', '.join(odd)} changes tokens", "Leave it out.")
    config, cache = request.generation_config, request.model_kwargs.get("past_key_values")
    if config.return_dict_in_generate and (config.output_scores or config.output_logits):
        raise UnsupportedError("ByteLevel", "has no scores of tokens", "Use ByteLM.next_byte_logprobs.")
    if cache is not None and cache.get_seq_length():
        raise UnsupportedError("ByteLevel", "cannot continue a cache, since the prompt is read anew", "Pass no cache.")
    if request.model_kwargs.get("inputs_embeds") is not None:
        raise UnsupportedError("ByteLevel", "needs token ids, got inputs_embeds", "Pass input_ids.")


def small() -> ByteLevel:
    """An instance for tiny models of 64 tokens, used by the laws: single characters and a few pairs."""
    import tokenizers

    letters = [chr(c) for c in range(ord("!"), ord("!") + 60)]
    vocab = {letter: i for i, letter in enumerate(letters)}
    merges = [("!", '"'), ("#", "$"), ("%", "&"), ('!"', "#$")]
    vocab |= {a + b: 60 + i for i, (a, b) in enumerate(merges)}
    return ByteLevel(tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges)))
