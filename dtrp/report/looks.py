"""Who looks like what in figures: a method has one colour, the same in every report.

Colours can be told apart on light and on dark pages; lines of one colour differ in dash and marker, bars in hatching.
The first seven are Okabe and Ito's, which people with any colour vision tell apart.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
MARKERS = "osD^vPX*<>hdp8H1234"
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo", "--", "||", "**", "OO", "/.", "x.", "\\.", "+/", "o-", "|.", "*/",
           "O|")  # fmt: skip

# A method that is added comes last: the place decides dash and marker.
METHOD_COLOURS = {
    "bp": "#7F7F7F",
    "dtrp": "#0072B2",
    "fdg": "#D55E00",
    "spectrain": "#009E73",
    "fr": "#CC79A7",
    "pipedream": "#E69F00",
    "dtrp-1f1b": "#56B4E9",
    "dtr": "#8C6BC8",
    "ddg": "#A0522D",
    "dgl": "#C2304F",
    "dtrp-split": "#00A6A6",
    "spectrain-split": "#7CAA2D",
    "adl": "#B8860B",
    "gpipe": "#A89078",
    "bp-zb": "#6E8CA0",
}
_OTHER_COLOURS = ("#B07AA1", "#4C9F70", "#9C755F", "#76B7B2")  # of methods that this version does not know


class Look(NamedTuple):
    """The style of a series."""

    colour: str
    dash: Any
    marker: str
    hatch: str


def numbered_look(number: int) -> Look:
    """The style of the n-th series of a figure whose series are no methods."""
    again = number // len(COLOURS)  # rounds through all colours; the dash is shifted by as many
    return _look(COLOURS[number % len(COLOURS)], number, number + again)


def method_look(method: str, variant: int = 0) -> Look:
    """The style of a method.

    Args:
        method: its name; one that this version does not know has a colour by its name.
        variant: number of a series among those of the method in a figure, as of several predictions.
    """
    names = list(METHOD_COLOURS)
    number = names.index(method) if method in names else zlib.crc32(method.encode())
    return _look(
        METHOD_COLOURS.get(method, _OTHER_COLOURS[number % len(_OTHER_COLOURS)]), number + variant, number + variant
    )


def _look(colour: str, number: int, dash: int) -> Look:
    return Look(colour, DASHES[dash % len(DASHES)], MARKERS[number % len(MARKERS)], HATCHES[number % len(HATCHES)])


def method_looks(labels: Iterable[str]) -> dict[str, Look]:
    """The style of each label that begins with a method; labels of one method are numbered as they come."""
    variants: Counter[str] = Counter()
    looks = {}
    for label in labels:
        method = label.split(" ", 1)[0]
        looks[label] = method_look(method, variants[method])
        variants[method] += 1
    return looks
