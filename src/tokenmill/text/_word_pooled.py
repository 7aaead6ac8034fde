"""A language model over words: units of a word are pooled, a decoder reads words, units of the next are decoded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils.generic import ModelOutput

from tokenmill.errors import LimitError, UnsupportedError
from tokenmill.text import _word_generation as generation
from tokenmill.text._word_generation import WordScores
from tokenmill.text._word_segmenter import WordSegmenter

_WHERE = "WordPooledLM"
_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")  # of a vocabulary that the backbone does not have here


class WordPooledConfig(PretrainedConfig):
    """Shape of a `WordPooledLM`.

    Args:
        backbone: config of a decoder of transformers, or its dictionary; its width is the model's D, and its own
            vocabulary is not used.
        unit_vocab_size: V.
        num_prefix: p, vectors of a word.
        c_max: units of a word at most.
        enc_layers, enc_heads: of the word encoder.
        dec_layers, dec_heads: of the unit decoder.
        ff: width of their feed-forward layers as a multiple of D.
        unit_dropout: of encoder and decoder.
        block_size: words of a context when words have learned positions; None leaves positions to the backbone.
        tie_head: the unit decoder's output matrix is the embedding of units.
    """

    model_type = "tokenmill-word-pooled"
    sub_configs: ClassVar[dict[str, Any]] = {"backbone": AutoConfig}  # pyright: ignore[reportIncompatibleMethodOverride]

    def __init__(
        self, backbone: Any = None, unit_vocab_size: int = 256, num_prefix: int = 4, c_max: int = 24,
        enc_layers: int = 2, enc_heads: int = 4, dec_layers: int = 2, dec_heads: int = 4, ff: int = 4,
        unit_dropout: float = 0.0, block_size: int | None = None, tie_head: bool = False, **more: Any,
    ) -> None:  # fmt: skip
        if isinstance(backbone, dict):
            own = dict(backbone)
            backbone = AutoConfig.for_model(own.pop("model_type"), **own)
        elif backbone is None:
            backbone = AutoConfig.for_model("llama", hidden_size=64, num_hidden_layers=1, num_attention_heads=2,
                                            num_key_value_heads=2, intermediate_size=128)  # fmt: skip
        self.backbone = backbone
        self.unit_vocab_size, self.num_prefix, self.c_max = unit_vocab_size, num_prefix, c_max
        self.enc_layers, self.enc_heads, self.dec_layers, self.dec_heads = enc_layers, enc_heads, dec_layers, dec_heads
        self.ff, self.unit_dropout, self.block_size, self.tie_head = ff, unit_dropout, block_size, tie_head
        super().__init__(**{"tie_word_embeddings": False, **more})

    @property
    def hidden_size(self) -> int:
        """D."""
        return int(self.backbone.hidden_size)


@dataclass
class WordPooledOutput(ModelOutput):
    """What a forward pass gives.

    Attributes:
        loss: mean cross entropy of units and ends of words, in nats; None without `labels`.
        logits: (B, T, c + 1, V + 1) of each word's units and its end; id V is the end.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None


UnitCache = list[tuple[Tensor, Tensor]]


class _Block(nn.Module):
    """A causal transformer block with the norms first, and a cache of keys and values."""

    def __init__(self, dim: int, heads: int, ff: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.before, self.between = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, ff * dim), nn.Linear(ff * dim, dim)

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        n, length, dim = x.shape
        q, k, v = (
            part.view(n, length, self.heads, dim // self.heads).transpose(1, 2)
            for part in self.qkv(self.before(x)).chunk(3, dim=-1)
        )  # (N, H, L, d) each
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        seen = k.shape[2]
        mask = torch.ones(length, seen, dtype=torch.bool, device=x.device).tril(seen - length)
        drop = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop)
        x = x + F.dropout(self.out(mixed.transpose(1, 2).reshape(n, length, dim)), drop)
        x = x + F.dropout(self.down(F.gelu(self.up(self.between(x)))), drop)
        return x, (k, v)


class WordPooledLM(PreTrainedModel):
    """Word-pooled language model (paper, sections 3 and 4): encoder of a word, decoder of words, decoder of units.

    Words are read behind a learned start; the state behind word t writes word t + 1, all words at once in training.
    A word of no units is the end of a text.
    """

    config_class = WordPooledConfig
    base_model_prefix = "word_pooled"  # no module of that name: "backbone.norm" must not be taken for "norm"
    main_input_name = "units"
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: WordPooledConfig) -> None:
        super().__init__(config)
        dim, p = config.hidden_size, config.num_prefix
        _check(config)
        own = type(config.backbone)(**{**config.backbone.to_dict(), "vocab_size": 1, **dict.fromkeys(_IDS)})
        own._attn_implementation = config._attn_implementation
        self.backbone = AutoModel.from_config(own)
        self.embedding = nn.Embedding(config.unit_vocab_size + p, dim)  # the last p are the CLS symbols
        self.in_position = nn.Parameter(torch.zeros(p + config.c_max, dim))
        self.out_position = nn.Parameter(torch.zeros(p + config.c_max, dim))
        self.start = nn.Parameter(torch.zeros(p, dim))
        words = config.block_size
        self.word_position = None if words is None else nn.Parameter(torch.zeros(words * p, dim))
        drop = config.unit_dropout
        layer = nn.TransformerEncoderLayer(dim, config.enc_heads, config.ff * dim, drop, "gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, config.enc_layers, enable_nested_tensor=False)
        blocks = (_Block(dim, config.dec_heads, config.ff, drop) for _ in range(config.dec_layers))
        self.decoder = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, config.unit_vocab_size + 1, bias=False)
        self.segmenter: WordSegmenter | None = None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            init.zeros_(module.bias)
        if isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        if isinstance(module, nn.MultiheadAttention):
            init.normal_(module.in_proj_weight, std=0.02)
            init.zeros_(module.in_proj_bias)
        if isinstance(module, WordPooledLM):
            for table in (module.in_position, module.out_position, module.word_position):
                if table is not None:
                    init.zeros_(table)
            init.normal_(module.start, std=0.02)

    def forward(
        self, units: Tensor, lengths: Tensor, word_mask: Tensor | None = None, labels: Tensor | None = None, **_: Any
    ) -> WordPooledOutput:
        """Logits of every word from the words before it.

        Args:
            units: (B, T, c) base units; what lies behind a word's end is not read.
            lengths: (B, T) units of each word, 0 for the end of a text.
            word_mask: (B, T) bool, what is a word and no padding; padding stands on the right.
            labels: anything but None asks for the loss (the words are their own labels).

        Raises:
            LimitError: a unit outside the vocabulary, too many units or words, no words.
        """
        mask = torch.ones_like(lengths, dtype=torch.bool) if word_mask is None else word_mask.bool()
        units = self._checked(units, lengths, mask)
        vectors = self.pool(units[:, :-1], lengths[:, :-1], mask[:, :-1])  # (B, T - 1, p, D)
        first = self.start.expand(len(units), 1, -1, -1)
        states, _ = self.read(torch.cat([first, vectors], dim=1), mask)  # (B, T, p, D)
        logits = self.write(states[mask], units[mask], lengths[mask])  # (words, c + 1, V + 1)
        shown = logits.new_zeros(*mask.shape, *logits.shape[1:]).masked_scatter(mask[..., None, None], logits)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.flatten(0, 1).float(), self.targets(units[mask], lengths[mask]).flatten())
        return WordPooledOutput(loss=loss, logits=shown)

    def score(self, texts: Sequence[str], *, batch_size: int = 8) -> list[WordScores]:
        """Log-probability of every word of each text; needs a segmenter.

        Raises:
            LimitError: an empty text, or half of a surrogate pair in one.
        """
        return generation.score(self, self._words(), texts, batch_size)

    def generate(  # type: ignore[override]
        self, prompts: Sequence[str], *, max_new_words: int = 32, do_sample: bool = False, temperature: float = 1.0,
        top_k: int = 0, generator: torch.Generator | None = None, use_cache: bool = True,
        on_word: Callable[[int, str], None] | None = None,
    ) -> list[str]:  # fmt: skip
        """What the model writes behind each prompt, prompt not included; needs a segmenter.

        A prompt may end inside a word: its last units are the beginning of the first new word. A text ends with a word
        of no units, and a word of `c_max` units goes on in the next.

        Args:
            prompts: texts, "" for none.
            max_new_words: words of each at most.
            do_sample: draw units, else take the likeliest.
            temperature, top_k: of the draw; 0 is no limit.
            generator: of the draws.
            use_cache: keep keys and values of the backbone.
            on_word: called with the row and the text of each new word, for display.

        Raises:
            LimitError: a value outside its limit.
        """
        draw = generation.Draw(sample=do_sample, temperature=temperature, top_k=top_k, generator=generator)
        return generation.generate(
            self, self._words(), prompts, max_new_words=max_new_words, draw=draw, use_cache=use_cache, on_word=on_word
        )

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **more: Any) -> None:
        """As every model of transformers, with ``words.json`` of the segmenter beside the weights."""
        super().save_pretrained(save_directory, *args, **more)
        if self.segmenter is not None:
            self.segmenter.save(save_directory)

    @classmethod
    def from_pretrained(cls, folder: Any, *args: Any, **more: Any) -> Any:
        """As every model of transformers; a segmenter that lies in the folder comes along."""
        made = super().from_pretrained(folder, *args, **more)
        if (Path(folder) / "words.json").is_file():
            made.segmenter = WordSegmenter.load(folder)
        return made

    def _words(self) -> WordSegmenter:
        if self.segmenter is None:
            raise UnsupportedError(_WHERE, "there is no segmenter", "Set model.segmenter = WordSegmenter(...).")
        return self.segmenter

    def pool(self, units: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
        """(B, T, p, D) vectors of words; words alone are computed, padding gives zeros."""
        p = self.config.num_prefix
        own, sizes = units[mask], lengths[mask]  # (N, c), (N,)
        cls = torch.arange(p, device=units.device) + self.config.unit_vocab_size
        found = self.start.new_zeros(len(own), *self.start.shape)
        for rows, width in self.by_length(sizes):
            x = self.embedding(torch.cat([cls.expand(len(rows), p), own[rows, :width]], dim=1))
            x = F.dropout(x + self.in_position[: x.shape[1]], self.config.unit_dropout, self.training)
            hidden = torch.arange(x.shape[1], device=units.device) >= p + sizes[rows, None]  # the CLS are always seen
            found = found.index_copy(0, rows, self.encoder(x, src_key_padding_mask=hidden)[:, :p].to(found.dtype))
        return found.new_zeros(*mask.shape, *found.shape[1:]).masked_scatter(mask[..., None, None], found)

    def read(self, vectors: Tensor, mask: Tensor, cache: Any = None, seen: Tensor | None = None) -> tuple[Tensor, Any]:
        """States (B, T, p, D) of words behind those in the cache, and the cache.

        Args:
            vectors: (B, T, p, D), the start or pooled words.
            mask: (B, T) bool of these; with a cache of everything so far.
            cache: of the backbone; None for none.
            seen: (B,) words before these; None for none.
        """
        b, t, p, dim = vectors.shape
        steps = mask[:, -t:].repeat_interleave(p, dim=1)  # (B, pT)
        places = (steps.cumsum(1) - 1).clamp(min=0)
        if seen is not None:
            places = places + p * seen[:, None]
        z = vectors.reshape(b, t * p, dim)
        if self.word_position is not None:
            if int(places.max()) >= len(self.word_position):
                words, limit = int(places.max()) // p + 1, self.config.block_size
                mend = (
                    "Learned positions end there; a backbone with rotary positions (block_size=None) has no such end."
                )
                what = f"at most block_size={limit}"
                raise LimitError(_WHERE, "words of the context", words, what, mend)
            z = z + self.word_position[places]
        made = self.backbone(
            inputs_embeds=F.dropout(z, self.config.unit_dropout, self.training),
            attention_mask=mask.repeat_interleave(p, dim=1).long(), position_ids=places, past_key_values=cache,
            use_cache=cache is not None,
        )  # fmt: skip
        return made.last_hidden_state.view(b, t, p, dim), made.past_key_values

    def write(self, states: Tensor, units: Tensor, lengths: Tensor) -> Tensor:
        """Logits (N, c + 1, V + 1) of the units of N words, each from its state (N, p, D) and the units before.

        What lies behind a word's end is zero or means nothing.
        """
        p, c = self.config.num_prefix, units.shape[1]
        found = states.new_zeros(len(states), c + 1, self.config.unit_vocab_size + 1)
        for rows, width in self.by_length(lengths):
            canvas = torch.cat([states[rows], self.embedding(units[rows, :width])], dim=1)
            logits = self.decode(canvas + self.out_position[: p + width], None)[0][:, p - 1 :]
            found = found.index_copy(0, rows, F.pad(logits, (0, 0, 0, c - width)).to(found.dtype))
        return found

    def by_length(self, lengths: Tensor) -> Iterator[tuple[Tensor, int]]:
        """(rows, width) of words of like length: most words are short, and padding all to the longest would cost most.

        Args:
            lengths: (N,).
        """
        longest = int(lengths.max()) if len(lengths) else -1
        above = -1
        for width in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, longest):
            width = min(width, longest)
            rows = ((lengths > above) & (lengths <= width)).nonzero()[:, 0]
            if len(rows):
                yield rows, width
            above = max(above, width)

    def decode(self, canvas: Tensor, cache: UnitCache | None) -> tuple[Tensor, UnitCache]:
        """Logits (N, L, V + 1) of a canvas (N, L, D) behind what is in the cache."""
        x, kept = F.dropout(canvas, self.config.unit_dropout, self.training), []
        for i, block in enumerate(self.decoder):
            x, own = block(x, cache[i] if cache is not None else None)
            kept.append(own)
        weight = self.embedding.weight[: self.config.unit_vocab_size] if self.config.tie_head else None
        x = self.norm(x)
        logits = self.head(x)
        if weight is not None:
            logits = torch.cat([x @ weight.T, logits[..., -1:]], dim=-1)
        return logits, kept

    def targets(self, units: Tensor, lengths: Tensor) -> Tensor:
        """(N, c + 1): the units, one end (V) behind them, -100 elsewhere; a word of c_max units ends by itself."""
        place = torch.arange(units.shape[1] + 1, device=units.device)
        wide = F.pad(units, (0, 1))
        found = torch.where(place < lengths[:, None], wide, torch.full_like(wide, -100))
        ends = (place == lengths[:, None]) & (lengths[:, None] < self.config.c_max)
        return found.masked_fill(ends, self.config.unit_vocab_size)

    def _checked(self, units: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
        """The units with zeros behind each end, at most as wide as the longest word."""
        if units.ndim != 3 or units.shape[:2] != lengths.shape or not units.shape[1]:
            raise LimitError(_WHERE, "shape of units", tuple(units.shape), "(B, T, c) with at least one word")
        longest = int(lengths.max())
        if longest > min(units.shape[2], self.config.c_max) or int(lengths.min()) < 0:
            raise LimitError(_WHERE, "lengths", longest, f"in [0, c_max={self.config.c_max}] and at most c")
        units = units[:, :, :longest]
        real = (torch.arange(longest, device=units.device) < lengths[..., None]) & mask[..., None]
        units = units.masked_fill(~real, 0)
        if units.numel() and (int(units.max()) >= self.config.unit_vocab_size or int(units.min()) < 0):
            wrong = int(units.max()) if int(units.max()) >= self.config.unit_vocab_size else int(units.min())
            size = self.config.unit_vocab_size
            what = f"unit id {wrong} outside base vocabulary of size {size}"
            raise LimitError(_WHERE, "units", wrong, f"in [0, {size})", what)
        return units


def _check(config: WordPooledConfig) -> None:
    for name in ("unit_vocab_size", "num_prefix", "c_max", "enc_layers", "enc_heads", "dec_layers", "dec_heads", "ff"):
        if getattr(config, name) < 1:
            raise LimitError(_WHERE, name, getattr(config, name), "at least 1")
    for name in ("enc_heads", "dec_heads"):
        if config.hidden_size % getattr(config, name):
            raise LimitError(_WHERE, name, getattr(config, name), f"a divisor of the width {config.hidden_size}")
    if getattr(config.backbone, "is_encoder_decoder", False) or config.backbone.model_type in ("bert", "roberta"):
        what = f"a backbone of type {config.backbone.model_type}"
        raise UnsupportedError(_WHERE, what, "Take a decoder: llama, qwen2, gpt2, gemma3_text, ...")
