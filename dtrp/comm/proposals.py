"""What ranks agree on while they train, without waiting for each other.

A rank that is asked to stop, or whose clock says that a save is due, cannot do so alone: a save needs all ranks after the
same step, and they are in different ones. The first stage is always ahead, and every other one hears from it in every
mini-batch. So proposals go to it, and it decides:

::

    first stage    step 7          step 8                step 9: the word is in the messages of mini-batch 9
                     |    ^          |
                     v    | word     v                   on every rank ``agreed`` says so after step 9
    last stage     step 6           step 7: proposes

Backward messages carry the proposals, each once, and forward messages the word. Where no gradients travel a proposal is a
message by itself. First stages of several replicas agree
at U, with the gradients that they average there, and all decide in the step after it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

NUM_BITS = 2  # of a word


class Proposals:
    """Those of a rank that have not gone on to the first one yet.

    Attributes:
        agreed: the word of the last step.
    """

    def __init__(self) -> None:
        self.agreed = 0
        self._waiting: deque[int] = deque()  # a signal handler may come in at any time

    def add(self, word: int) -> None:
        self._waiting.append(word)

    def take(self) -> int:
        """All of them as one word; they wait no longer."""
        word = 0
        while self._waiting:
            word |= self._waiting.popleft()
        return word


def bits_of(word: int) -> list[int]:
    """A word as numbers that can be added up over ranks."""
    return [word >> bit & 1 for bit in range(NUM_BITS)]


def word_of(sums: Sequence[float]) -> int:
    """What any rank had in its word, from the sums of `bits_of` over all."""
    return sum(1 << bit for bit, count in enumerate(sums) if count)
