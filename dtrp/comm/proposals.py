"""How ranks agree on something while they train, without waiting for each other.

A rank that is asked to stop, or whose clock says that a save is due, cannot do so alone: a save needs all ranks after
the same step, and they are in different steps. The first stage is always ahead, and every other stage receives a
message that comes from it in every mini-batch. So proposals go to the first stage, and it decides:

::

    first stage    step 7          step 8                step 9: the word is in the messages of mini-batch 9
                     |    ^          |
                     v    | word     v                   on every rank it is ``agreed`` after step 9
    last stage     step 6           step 7: proposes

A proposal is a word of a few bits. Backward messages carry proposals, each once, and forward messages the word that is
agreed on. Where no gradients travel a proposal is a message by itself. The first stages of several replicas agree at U,
with the gradients that they average there, and all of them decide in the step after it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

NUM_BITS = 2  # of a word


class Proposals:
    """The proposals of a rank that have not been sent on to the first stage yet.

    Attributes:
        agreed: the word that all ranks have agreed on in the last step; 0 is nothing.
    """

    def __init__(self) -> None:
        self.agreed = 0
        self._waiting: deque[int] = deque()  # a signal handler may add to it at any time

    def add(self, word: int) -> None:
        self._waiting.append(word)

    def take(self) -> int:
        """All waiting proposals as one word; none waits any longer."""
        word = 0
        while self._waiting:
            word |= self._waiting.popleft()
        return word


def word_to_bits(word: int) -> list[int]:
    """The bits of a word, as numbers that can be added up over ranks."""
    return [word >> bit & 1 for bit in range(NUM_BITS)]


def word_from_sums(sums: Sequence[float]) -> int:
    """The bits that any rank had in its word, from the sums of `word_to_bits` over all ranks."""
    return sum(1 << bit for bit, count in enumerate(sums) if count)
