"""The filter in front of a call: user messages are read out of whatever prompts come as, and checked one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenmill.errors import LimitError, TokenmillError

if TYPE_CHECKING:
    from collections.abc import Callable

    from tokenmill.text._cpt_verdict import Verdict
    from tokenmill.text.cpt_filtering import CPTFilter

_TEXT_PARTS = ("text", "input_text")


class FlaggedPromptError(TokenmillError, ValueError):
    """A prompt looks encoded.

    Attributes:
        verdict: on the message.
        index: of the message, as it stands in the request.
    """

    def __init__(self, verdict: Verdict, index: int) -> None:
        span = verdict.worst_span
        where = f", worst from character {span.start} to {span.stop}" if span else ""
        score = f" ({verdict.cpt:.2f} characters per token)" if verdict.cpt is not None else ""
        super().__init__(f"CPTFilter: message {index} is flagged: {verdict.reason}{score}{where}.")
        self.verdict, self.index = verdict, index


def user_texts(prompt: Any, roles: Sequence[str]) -> Iterator[tuple[int, str]]:
    """The texts to check, with the index of their message.

    Args:
        prompt: a text, a list of texts, chat messages with string contents or content parts, or a list of chats.
        roles: whose messages count; a message without a role counts as a user's.

    Raises:
        LimitError: a prompt of another kind.
    """
    if isinstance(prompt, str):
        yield 0, prompt
        return
    if isinstance(prompt, dict):
        prompt = [prompt]
    if not isinstance(prompt, list | tuple):
        raise LimitError("guard", "type of prompt", type(prompt).__name__, "a text, a list of texts, or chat messages")
    for index, one in enumerate(prompt):
        if isinstance(one, str):
            yield index, one
        elif isinstance(one, dict):
            if one.get("role", roles[0] if roles else "") in roles:
                for text in content_texts(one.get("content", one.get("text"))):
                    yield index, text
        elif isinstance(one, list | tuple):
            for _, text in user_texts(one, roles):
                yield index, text
        else:
            raise LimitError("guard", f"type of prompt[{index}]", type(one).__name__, "a text or a message")


def content_texts(content: Any) -> Iterator[str]:
    """The texts of a message: its content, or the content's text parts."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, list | tuple):
        for part in content:
            if isinstance(part, str):
                yield part
            elif (
                isinstance(part, dict) and part.get("type", "text") in _TEXT_PARTS and isinstance(part.get("text"), str)
            ):
                yield part["text"]


def first_flagged(found: CPTFilter, texts: Sequence[tuple[int, str]]) -> tuple[int, str, Verdict] | None:
    """(index, text, verdict) of the first flagged text."""
    for (index, text), verdict in zip(texts, found.flag_batch([text for _, text in texts]), strict=True):
        if verdict.flagged:
            return index, text, verdict
    return None


@dataclass(frozen=True, slots=True)
class Guard:
    """A call behind a filter; see `CPTFilter.guard`."""

    call: Callable[..., Any]
    filter: CPTFilter
    refusal: Any = None
    roles: tuple[str, ...] = ("user",)

    def __call__(self, prompt: Any, *args: Any, **kwargs: Any) -> Any:
        """`call` on a prompt that passes; the refusal, or an error, for one that does not.

        Raises:
            FlaggedPromptError: a flagged message where there is no refusal.
        """
        found = first_flagged(self.filter, list(user_texts(prompt, self.roles)))
        if found is None:
            return self.call(prompt, *args, **kwargs)
        index, _, verdict = found
        if self.refusal is None:
            raise FlaggedPromptError(verdict, index)
        return self.refusal
