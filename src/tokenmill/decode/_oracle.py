"""What a population asks constraint and critic: counted, remembered within a step, and errors with what was made."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from tokenmill.decode._population import Particle, SMCTrace
from tokenmill.decode._potential import State, as_potential
from tokenmill.decode._weights import WeightedSequences
from tokenmill.errors import LimitError, StoppedError, TokenmillError
from tokenmill.text import TokenBytes


class Critic(Protocol):
    """Soft scores of a text in log space: any number below +inf, -inf for never."""

    def prefix(self, context: bytes, /) -> float:
        """The score of an unfinished text."""
        ...

    def complete(self, context: bytes, /) -> float:
        """The score of a finished text."""
        ...


class Oracle:
    """The constraint and the critic of one run, in terms of tokens.

    Args:
        where: the method, for messages.
        constraint: see `as_potential`.
        tokens: what the tokens stand for.
        eos_ids: end tokens, which count as one; the first stands for all.
        trace: is filled.
        critic: see `Critic`.

    Attributes:
        partial: gives the particles so far, for errors.

    Raises:
        LimitError: no constraint, no critic, or an end token below 0.
    """

    def __init__(
        self,
        where: str,
        constraint: Any,
        tokens: TokenBytes,
        eos_ids: Sequence[int],
        trace: SMCTrace,
        *,
        critic: Critic | None = None,
    ) -> None:
        self.where, self.tokens, self.trace, self.critic = where, tokens, trace, critic
        self.potential = as_potential(constraint)
        self.eos_ids = list(dict.fromkeys(int(i) for i in eos_ids))
        if any(i < 0 for i in self.eos_ids):
            raise LimitError(where, "eos_ids", self.eos_ids, "ids >= 0", "Leave out what is not set.")
        check_critic(where, critic)
        self.partial: Callable[[], WeightedSequences | None] = lambda: None
        # Answers of this step by state and token. The state is kept with them, so that no other gets its id.
        self._answers: dict[tuple[int, int], tuple[State, bool]] = {}
        self._states: dict[tuple[int, int], tuple[State, State]] = {}

    def start(self) -> State:
        """The state that has read nothing.

        Raises:
            LimitError: no string satisfies the constraint.
        """
        with self._guarded(b""):
            possible = self.potential.prefix(b"") == 0
            if possible:
                return self.potential.start()
        mend = "Check the constraint: no string satisfies it."
        raise LimitError(self.where, "prefix(b'')", -math.inf, "0", mend)

    def forget(self) -> None:
        """Begin a step."""
        self._answers.clear()
        self._states.clear()

    def is_end(self, token: int) -> bool:
        """Does this token end the text?"""
        return token in self.eos_ids

    def end_token(self, law: Tensor, generator: torch.Generator | None, *, likeliest: bool = False) -> int:
        """Which of the end tokens to write: drawn by their shares of ``law`` (V,), or the likeliest."""
        shares = law[self.eos_ids]
        if len(self.eos_ids) == 1 or likeliest:
            return self.eos_ids[int(shares.argmax())]
        return self.eos_ids[int(torch.multinomial(shares.softmax(0), 1, generator=generator))]

    def accepts(self, particle: Particle, token: int) -> bool:
        """May this token come next? The end token asks whether the text is whole."""
        key = (id(particle.state), token)
        if key not in self._answers:
            self.trace.checks += 1
            with self._guarded(particle.text):
                if self.is_end(token):
                    answer = particle.state.accepting()
                else:
                    data = self.tokens[token]
                    answer = data is not None and particle.state.allows(data)
            self._answers[key] = (particle.state, bool(answer))
        return self._answers[key][1]

    def accepting(self, particle: Particle) -> bool:
        """Is the particle's text whole? Counted as a check."""
        self.trace.checks += 1
        with self._guarded(particle.text):
            return bool(particle.state.accepting())

    def advance(self, particle: Particle, token: int) -> None:
        """Let the particle read an accepted token; particles in one state that read one token share the next."""
        data, key = self.tokens[token] or b"", (id(particle.state), token)
        if key not in self._states:
            with self._guarded(particle.text):
                self._states[key] = (particle.state, particle.state.advance(data))
        particle.state = self._states[key][1]
        particle.text += data

    def score(self, particle: Particle) -> float | None:
        """What the critic says of a particle; None without a critic.

        Raises:
            LimitError: NaN or +inf.
        """
        if self.critic is None:
            return None
        self.trace.critic_calls += 1
        ask = self.critic.complete if particle.status == "finished" else self.critic.prefix
        with self._guarded(particle.text, "critic"):
            found = float(ask(particle.text))
        if math.isnan(found) or found == math.inf:
            raise LimitError(self.where, f"the critic's score of {particle.text!r}", found, "a number below +inf")
        return found

    def blocked(self, width: int) -> Tensor:
        """Ids in [0, width) that are never drawn: without bytes or beyond the tokenizer, and no end token.

        Raises:
            LimitError: an end token that the model does not have.
        """
        if any(i >= width for i in self.eos_ids):
            raise LimitError(self.where, "eos_ids", self.eos_ids, f"below the model's vocabulary {width}")
        known = self.tokens.tokens[:width]
        none = [i for i, data in enumerate(known) if data is None] + list(range(len(known), width))
        return torch.tensor(sorted(set(none) - set(self.eos_ids)), dtype=torch.int64)

    @contextmanager
    def _guarded(self, text: bytes, who: str = "constraint") -> Generator[None, None, None]:
        """Errors of somebody's code come out with the particles so far."""
        try:
            yield
        except TokenmillError as error:
            error.partial = self.partial() if error.partial is None else error.partial
            raise
        except Exception as error:
            what = f"the {who} raised {type(error).__name__}: {error} at {text!r}"
            message = f"{self.where}: {what}. The particles so far are in .partial."
            raise StoppedError(message, partial=self.partial()) from error


def check_critic(where: str, critic: Any) -> None:
    """Refuse a critic that cannot be asked.

    Raises:
        LimitError: ``prefix`` or ``complete`` is missing.
    """
    if critic is not None and not all(callable(getattr(critic, name, None)) for name in ("prefix", "complete")):
        raise LimitError(where, "critic", critic, "an object with prefix(bytes) and complete(bytes)", "Log space.")
