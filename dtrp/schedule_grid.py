"""`Schedule`: a whole run as a grid of stages by slots; built, checked, printed and read back."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

from .methods import get_method
from .schedule import Action, Order, Slot, StageOrder, cycle, lead, through
from .validation import whole


class ScheduleError(ValueError):
    """A schedule that breaks a rule; the message shows the grid with the offending cell marked."""


_LOCAL = ", local losses"  # what the first line of a grid says of them


@dataclass(frozen=True)
class Schedule:
    """A whole run: for each stage its actions in order, start-up and flush included.

    ``str(schedule)`` is a grid, stage by slot, and `Schedule.parse` reads it back. A column of the grid
    is one slot long (a forward and a backward, together or either alone), and one action where backwards are in two
    parts; what is sent in one column is there in the next; an empty cell is a worker that waits. A schedule is the
    order in each row: in which column a cell stands is how it is shown, and not checked.

    >>> print(Schedule.build("dtrp", num_stages=2, num_minibatches=4))
    dtrp: stages 2, mini-batches 4, micro-batches in each 1
    stage 0 | F0 | F1      | B0 U F2 | B1 U F3 | B2 U    | B3 U
    stage 1 |    | F0 B0 U | F1 B1 U | F2 B2 U | F3 B3 U |
    delay 0 | 0 1 1 1
    delay 1 | 0 0 0 0
    """

    name: str
    minibatches: tuple[int, ...]  # micro-batches in each mini-batch
    stages: tuple[tuple[Action, ...], ...]
    declared: tuple[tuple[int, ...], ...] = field(default=())  # the delays it claims, by stage and micro-batch
    local: bool = False  # whether each stage has a loss of its own, so that its B waits for no other
    # Of a method with leads and orders of its own, or with backwards in two parts: by stage its lead and its cycle.
    orders: tuple[tuple[int, str], ...] = field(default=())

    @classmethod
    def build(
        cls,
        method: Order | str,
        num_stages: int,
        num_minibatches: int,
        num_microbatches: int | Sequence[int] = 1,
    ) -> Schedule:
        """The schedule of ``num_minibatches`` mini-batches and the flush after them.

        Args:
            method: a `dtrp.Method`, or a method's name.
            num_stages: K.
            num_minibatches: how many mini-batches the run has.
            num_microbatches: A, or one number for each mini-batch.

        Raises:
            ValueError: a count below 1, or as many numbers of micro-batches as there are no mini-batches.
        """
        if isinstance(method, str):
            method = get_method(method)
        for label, value in (("num_stages", num_stages), ("num_minibatches", num_minibatches)):
            whole(label, value)
        sizes = (num_microbatches,) * num_minibatches if isinstance(num_microbatches, int) else tuple(num_microbatches)
        if len(sizes) != num_minibatches or min(sizes) < 1:
            raise ValueError(
                f"num_microbatches={num_microbatches!r}: pass one number of at least 1, or one for each of "
                f"the num_minibatches={num_minibatches}"
            )
        stages, declared = [], []
        for stage in range(num_stages):
            order = StageOrder(method, num_stages, stage)
            slots = [slot for size in sizes for slot in order.minibatch(size)] + order.flush()
            stages.append(tuple(action for slot in slots for action in slot))
            declared.append(_closed_form_delays(method, num_stages, stage, sizes))
        shows_orders = method.leads is not None or method.orders is not None
        shows_orders = shows_orders or (method.split_backward and not method.flush)
        orders = [(lead(method, num_stages, k), cycle(method, num_stages, k)) for k in range(num_stages)]
        return cls(
            method.name, sizes, tuple(stages), tuple(declared), method.local, tuple(orders) if shows_orders else ()
        )

    @property
    def num_stages(self) -> int:
        return len(self.stages)

    @property
    def num_microbatches(self) -> int:
        """Micro-batches in the whole run."""
        return sum(self.minibatches)

    def delays(self) -> dict[int, list[int]]:
        """``{stage: [delay of micro-batch 0, 1, ...]}``, counted from the order of the actions, in updates."""
        return {stage: self._count_delays(actions) for stage, actions in enumerate(self.stages)}

    def peak_stash(self) -> dict[int, int]:
        """``{stage: n}``: the most micro-batches that have had their F and not finished their B, both its parts."""
        change = {"F": 1, "B": -1, "W": -1}
        held = (itertools.accumulate(change.get(action.kind, 0) for action in actions) for actions in self.stages)
        return {stage: max([0, *counts]) for stage, counts in enumerate(held)}

    def validate(self) -> None:
        """Check every rule of a schedule.

        Each stage runs every F and every B exactly once and in order, each F before its B, and U right
        after the last B of each mini-batch; every action's input arrives (no deadlock); the delays are
        those that the grid declares.

        Raises:
            ScheduleError: with the rule, and the grid with the offending cell between ``>`` and ``<``.
        """
        for stage in range(self.num_stages):
            self._check_stage(stage)
        # Lock step: whatever can run runs; a column in which nothing does is a deadlock.
        done = _Progress(self.stages, self.local)
        while not done.finished:
            if not done.column(hop=1):
                stage = next(k for k in range(self.num_stages) if done.next[k] < len(self.stages[k]))
                action = self.stages[stage][done.next[stage]]
                raise self._error(
                    stage, done.next[stage], f"deadlock: stage {stage} waits forever for the input of {action}"
                )
        for stage, declared in enumerate(self.declared):
            counted = self._count_delays(self.stages[stage])
            for micro, (want, got) in enumerate(zip(declared, counted, strict=False)):
                if want != got:
                    place = self.stages[stage].index(Action("F", micro))
                    raise self._error(
                        stage, place, f"stage {stage} declares delay {want} for micro-batch {micro}; counted: {got}"
                    )
            if len(declared) != len(counted):
                end = len(self.stages[stage])
                text = f"stage {stage} declares {len(declared)} delays for {len(counted)} micro-batches"
                raise self._error(stage, end, text)

    def _count_delays(self, actions: Iterable[Action]) -> list[int]:
        owner = [b for b, size in enumerate(self.minibatches) for _ in range(size)]
        delays, updates = [], 0
        for action in actions:
            updates += action.kind == "U"
            if action.kind == "F" and action.index < len(owner):
                delays.append(owner[action.index] - updates)
        return delays

    def _check_stage(self, stage: int) -> None:
        ends = list(itertools.accumulate(self.minibatches))
        done = Counter[str]()
        for place, action in enumerate(self.stages[stage]):
            if rule := self._broken_rule(stage, action, done, ends):
                raise self._error(stage, place, rule)
            done[action.kind] += 1
        total = self.num_microbatches
        parts = ("F", "I", "W") if done["I"] or done["W"] else ("F", "B")
        if any(done[part] != total for part in parts) or done["U"] != len(ends):
            raise self._error(
                stage,
                len(self.stages[stage]),
                f"stage {stage} ends after {', '.join(f'{done[part]} {part}' for part in parts)} and {done['U']} U; "
                f"the run has {', '.join([str(total)] * len(parts))} and {len(ends)}",
            )

    def _broken_rule(self, stage: int, action: Action, done: Counter[str], ends: list[int]) -> str | None:
        """The rule that an action breaks after the actions ``done``; ``ends``: micro-batches up to the end of each mini-batch."""
        # A mini-batch's last B, or last W, is through, and its U is not.
        due = done["U"] < len(ends) and done["B"] + done["W"] == ends[done["U"]]
        if action.kind == "U":
            return None if due else f"stage {stage} updates before a mini-batch's last backward"
        if due:
            return f"stage {stage} runs {action} where U of mini-batch {done['U']} is due"
        if action.index >= self.num_microbatches:
            return f"{action} is beyond the last of {self.num_microbatches} micro-batches"
        following = done["I" if action.kind == "R" else action.kind]
        if action.index != following:
            return f"stage {stage} runs {action} where {action.kind}{following} is next"
        if (action.kind == "B" and done["I"]) or (action.kind == "I" and done["B"]):
            return f"stage {stage} runs {action} where its backwards are {'in two parts' if done['I'] else 'whole'}"
        before = "I" if action.kind == "W" else "F"
        if action.kind in "BRIW" and action.index >= done[before]:
            return f"stage {stage} runs {action} before {before}{action.index}"
        return None

    # -- the grid -----------------------------------------------------------------------------------

    def __str__(self) -> str:
        return self.grid()

    def grid(self, hop: Literal[0, 1] = 1) -> str:
        """The run as text. A message takes ``hop`` columns: 1, a whole slot, or 0, none at all."""
        return self._render(self._columns(hop))

    def _columns(self, hop: Literal[0, 1]) -> list[list[Slot]]:
        """cells[stage][column]: what the stage does in that column when everyone starts as early as possible."""
        done = _Progress(self.stages, self.local)
        while not done.finished:
            if not done.column(hop):
                return self._bare()  # a deadlock: show the bare order
        return done.cells

    def _render(self, cells: list[list[Slot]], marked: tuple[int, int] | None = None) -> str:
        texts = []
        for stage, row in enumerate(cells):
            place, line = 0, []
            for cell in row:
                words = []
                for action in cell:
                    words.append(f">{action}<" if (stage, place) == marked else str(action))
                    place += 1
                line.append(" ".join(words))
            if (stage, place) == marked:
                line.append(">end<")
            texts.append(line)
        widths = [max(len(line[c]) for line in texts if c < len(line)) for c in range(max(map(len, texts)))]
        sizes = self.minibatches[:1] if len(set(self.minibatches)) == 1 else self.minibatches
        lines = [
            f"{self.name}: stages {self.num_stages}, mini-batches {len(self.minibatches)}, "
            f"micro-batches in each {' '.join(map(str, sizes))}{_LOCAL if self.local else ''}"
        ]
        for stage, line in enumerate(texts):
            padded = [text.ljust(width) for text, width in zip(line, widths, strict=False)]
            padded += [" " * width for width in widths[len(line) :]]
            lines.append(f"stage {stage} | " + " | ".join(padded))
        for stage, declared in enumerate(self.declared):
            lines.append(f"delay {stage} | " + " ".join(map(str, declared)))
        for stage, (ahead, letters) in enumerate(self.orders):
            lines.append(f"order {stage} | lead {ahead} {letters}")
        return "\n".join(line.rstrip() for line in lines)

    def _error(self, stage: int, place: int, rule: str) -> ScheduleError:
        """``place``: of the offending action in its stage's row, or one past the last."""
        return ScheduleError(f"{rule}\n{self._render(self._bare(), (stage, place))}")

    def _bare(self) -> list[list[Slot]]:
        """The cells of each stage, without regard to the others."""
        fits = _cell(self.stages)
        rows: list[list[Slot]] = []
        for actions in self.stages:
            cells: list[list[Action]] = [[]]
            for action in actions:
                if not fits(cells[-1], action):
                    cells.append([])
                cells[-1].append(action)
            rows.append([tuple(cell) for cell in cells])
        return rows

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Read a grid back: ``Schedule.parse(str(schedule)) == schedule``. Only the form is checked here.

        Raises:
            ScheduleError: a line or a cell that is not of a grid's form.
        """
        lines = [line for line in text.strip().splitlines() if line.strip()]
        first = lines[0].strip() if lines else ""
        header = re.fullmatch(
            r"(\S+): stages (\d+), mini-batches (\d+), micro-batches in each ([\d ]+)(" + _LOCAL + ")?", first
        )
        if not header:
            raise ScheduleError(
                "a grid begins with a line like 'dtrp: stages 2, mini-batches 8, micro-batches in each 1'; "
                f"got {first or 'nothing'!r}"
            )
        sizes = tuple(map(int, header[4].split()))
        if len(sizes) == 1:
            sizes *= int(header[3])
        if int(header[2]) < 1:
            raise ScheduleError(f"a grid has at least one stage; got {first!r}")
        if len(sizes) != int(header[3]) or not sizes or min(sizes) < 1:
            raise ScheduleError(f"one number of micro-batches, at least 1, for each mini-batch; got {first!r}")
        stages: list[tuple[Action, ...]] = []
        declared: list[tuple[int, ...]] = []
        orders: list[tuple[int, str]] = []
        for line in lines[1:]:
            row = re.fullmatch(r"(stage|delay|order) (\d+) \|(.*)", line.strip())
            rows = {"stage": len(stages), "delay": len(declared), "order": len(orders)}
            if not row or int(row[2]) != rows[row[1]]:
                raise ScheduleError(f"expected a line 'stage {len(stages)} | ...' or 'delay ...'; got {line!r}")
            words = row[3].replace("|", " ").split()
            if row[1] == "order":
                orders.append(_parse_order(words, line))
            elif row[1] == "stage":
                stages.append(tuple(_parse_actions(words, len(stages))))
            elif not all(word.isdecimal() for word in words):
                raise ScheduleError(f"delays are whole numbers; got {line!r}")
            else:
                declared.append(tuple(map(int, words)))
        if len(stages) != int(header[2]) or any(len(rows) not in (0, len(stages)) for rows in (declared, orders)):
            raise ScheduleError(
                f"the first line says {header[2]} stages; the grid has {len(stages)} stage lines "
                f"and {len(declared)} delay lines{f' and {len(orders)} order lines' if orders else ''}"
            )
        return cls(header[1], sizes, tuple(stages), tuple(declared), header[5] is not None, tuple(orders))


class _Progress:
    """A run in lock step: in each column a stage runs at most one action of a kind, as soon as their inputs are there."""

    def __init__(self, stages: Sequence[Sequence[Action]], local: bool) -> None:
        self.stages, self.local = stages, local
        self.fits = _cell(stages)
        self.next = [0] * len(stages)  # place of each stage's next action
        self.cells: list[list[Slot]] = [[] for _ in stages]
        self._when: dict[tuple[int, Action], int] = {}  # (stage, action) -> its column

    @property
    def finished(self) -> bool:
        return all(place == len(actions) for place, actions in zip(self.next, self.stages, strict=True))

    def column(self, hop: int) -> bool:
        """Run one column; False when nothing could run."""
        now = len(self.cells[0])
        cells: list[list[Action]] = [[] for _ in self.stages]
        moved = True
        while moved:  # more than once only where hop = 0 lets a message arrive in the column it was sent in
            moved = False
            for stage, actions in enumerate(self.stages):
                while self.next[stage] < len(actions):
                    action = actions[self.next[stage]]
                    if not self.fits(cells[stage], action) or not self._ready(stage, action, now - hop):
                        break
                    cells[stage].append(action)
                    self._when[stage, action] = now
                    self.next[stage] += 1
                    moved = True
        for row, cell in zip(self.cells, cells, strict=True):
            row.append(tuple(cell))
        return any(cells)

    def _ready(self, stage: int, action: Action, latest: int) -> bool:
        """Whether what the action needs from a neighbour was sent in column ``latest`` or before."""
        if action.kind == "F" and stage > 0:
            source = stage - 1
        elif action.kind in "BI" and stage < len(self.stages) - 1 and not self.local:
            source = stage + 1
        else:
            return True
        return self._when.get((source, action), latest + 1) <= latest


def _cell(stages: Iterable[Iterable[Action]]) -> Callable[[Sequence[Action], Action], bool]:
    """Whether an action has room in a cell: beside another kind; alone, but for U, where backwards are in two parts."""
    parts = any(action.kind in "RIW" for actions in stages for action in actions)

    def fits(cell: Sequence[Action], action: Action) -> bool:
        return action.kind == "U" or not any(parts or other.kind == action.kind for other in cell)

    return fits


def _parse_actions(words: Sequence[str], stage: int) -> Iterator[Action]:
    updates = 0
    for place, word in enumerate(words):
        if word == "U":
            yield Action("U", updates)
            updates += 1
        elif re.fullmatch(r"[FBRIW]\d+", word):
            yield Action(cast(Literal["F", "B", "R", "I", "W"], word[0]), int(word[1:]))
        else:
            shown = " ".join([*words[:place], f">{word}<", *words[place + 1 :]])
            raise ScheduleError(
                f"a cell holds F<n>, B<n> and U (in two parts R<n>, I<n>, W<n>); got {word!r}\nstage {stage} | {shown}"
            )


def _parse_order(words: Sequence[str], line: str) -> tuple[int, str]:
    if len(words) != 3 or words[0] != "lead" or not words[1].isdecimal() or not set(words[2]) <= set("FBRIW"):
        raise ScheduleError(f"an order is written 'lead 2 RFIW'; got {line!r}")
    return int(words[1]), words[2]


def _closed_form_delays(order: Order, num_stages: int, stage: int, sizes: Sequence[int]) -> tuple[int, ...]:
    """The delays from start-up on, from the formula rather than from the actions."""
    ends = list(itertools.accumulate(sizes))
    ahead, before = lead(order, num_stages, stage), through(cycle(order, num_stages, stage))
    delays = []
    updates = 0
    for minibatch, (end, size) in enumerate(zip(ends, sizes, strict=True)):
        for micro in range(end - size, end):
            cycles, place = divmod(micro, len(before))
            backwards = cycles * len(before) + before[place] - ahead  # done when F(micro) runs
            while updates < minibatch and ends[updates] <= backwards:
                updates += 1
            delays.append(0 if order.flush else minibatch - updates)
    return tuple(delays)
