"""A transformers model as one that can be asked: batched, padded on the left, greedy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tokenmill.errors import LimitError
from tokenmill.probe._answers import Reply

_WHERE = "needle-threading"


@dataclass(slots=True)
class Local:
    """A model with its tokenizer.

    Attributes:
        model: anything of transformers with ``generate``.
        tokenizer: the model's.
        batch_size: prompts at once.
        template: "auto" writes prompts with the tokenizer's chat template if it has one, "none" never.
        name: tells models apart in a file of answers; by default the model's path, and how it is asked.
        generate: further arguments of ``model.generate``, such as ``custom_generate``.

    Raises:
        LimitError: a batch below one, an unknown template.
    """

    model: Any
    tokenizer: Any
    batch_size: int = 1
    template: Literal["auto", "none"] = "auto"
    name: str = ""
    generate: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.batch_size, bool) or self.batch_size < 1:
            raise LimitError(_WHERE, "batch_size", self.batch_size, "at least 1")
        if self.template not in ("auto", "none"):
            raise LimitError(_WHERE, "template", self.template, "auto or none")
        if not self.name:
            path = getattr(self.model.config, "_name_or_path", "") or type(self.model).__name__
            self.name = f"{path}{', chat' if self.chat else ''}"

    @property
    def at_once(self) -> int:
        """Prompts that are given together."""
        return self.batch_size

    @property
    def chat(self) -> bool:
        """Whether prompts are written with a chat template."""
        return self.template == "auto" and bool(getattr(self.tokenizer, "chat_template", None))

    @property
    def limit(self) -> int | None:
        """Positions that the model was made for; None when its config does not say."""
        config = self.model.config
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        return getattr(text, "max_position_embeddings", None)

    def encode(self, prompt: str) -> list[int] | str:
        """The ids of a prompt, special tokens included; or why it cannot be asked."""
        if not self.chat:
            return list(self.tokenizer(prompt)["input_ids"])
        turn = [{"role": "user", "content": prompt}]
        written = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        # A template that strips the blank behind the question does no harm; one that escapes a character does.
        if prompt.strip() not in written:
            return "the chat template changes the prompt"
        return list(self.tokenizer(written, add_special_tokens=False)["input_ids"])

    def answer(self, prompts: Sequence[str], max_new_tokens: int) -> list[Reply]:
        """One reply a prompt; a prompt that does not fit is an error and is not cut."""
        replies: list[Reply | None] = [None] * len(prompts)
        rows: dict[int, list[int]] = {}
        for at, prompt in enumerate(prompts):
            ids = self.encode(prompt)
            if isinstance(ids, str):
                replies[at] = Reply(error=ids)
            elif self.limit is not None and len(ids) + max_new_tokens > self.limit:
                said = f"{len(ids)} tokens and {max_new_tokens} of the answer do not fit in {self.limit} positions"
                replies[at] = Reply(error=said, prompt_tokens=len(ids))
            else:
                rows[at] = ids
        if rows:
            for at, reply in zip(rows, self._generate(list(rows.values()), max_new_tokens), strict=True):
                replies[at] = reply
        return [reply for reply in replies if reply is not None]

    def _generate(self, rows: list[list[int]], max_new_tokens: int) -> list[Reply]:
        import torch

        width = max(map(len, rows))
        settings = self.model.generation_config
        ends = _ids(settings.eos_token_id) | _ids(self.tokenizer.eos_token_id)
        pad = next((i for i in (self.tokenizer.pad_token_id, settings.pad_token_id, *sorted(ends)) if i is not None), 0)
        ids = torch.full((len(rows), width), pad)  # (B, T)
        mask = torch.zeros_like(ids)
        for at, row in enumerate(rows):
            ids[at, width - len(row) :] = torch.tensor(row)
            mask[at, width - len(row) :] = 1
        device = self.model.device
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=pad,
                eos_token_id=sorted(ends) or None,
                **self.generate,
            )
        replies = []
        for row, new in zip(rows, out[:, width:].tolist(), strict=True):
            end = next((i for i, token in enumerate(new) if token in ends), len(new))
            text = self.tokenizer.decode(new[:end], skip_special_tokens=True)
            replies.append(Reply(text, "", len(row), end, cut=end == max_new_tokens))
        return replies


def _ids(value: Any) -> set[int]:
    return set() if value is None else {value} if isinstance(value, int) else set(value)
