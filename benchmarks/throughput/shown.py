"""What the documents say of the raw files in results/."""

from typing import Any

from shown import last_run, rows, table

_SLEEPING = rows("throughput/results/sleeping.jsonl")
# The table has the zero bubble too, which the last run may have left out.
_WITH_ALL = {line["run"] for line in _SLEEPING if line["contender"] == "torch InterleavedZeroBubble"}
SLEEPING = last_run([line for line in _SLEEPING if line["run"] in _WITH_ALL])
LINKS, TUN = (last_run(rows(f"throughput/results/{part}.jsonl")) for part in ("links", "tun"))
FIFO = last_run(rows("throughput/results/sleeping_fifo.jsonl"))
_COMPUTE = rows("throughput/results/compute.jsonl")
_COMPUTE_20 = [line for line in _COMPUTE if line["model"] == "resnet20"]
COMPUTE_20, BEFORE_20 = last_run(_COMPUTE_20), [line for line in _COMPUTE_20 if line["run"] == _COMPUTE_20[0]["run"]]
_COMPUTE_56 = [line for line in _COMPUTE if line["model"] == "resnet56"]
TABLE_56 = last_run(_COMPUTE_56)
CHANNELS_LAST = last_run(rows("throughput/results/channels_last.jsonl"))
SYNCHRONOUS = ("torch 1F1B", "torch GPipe", "torch InterleavedZeroBubble")
SIZES = (2, 4, 8)
TARGET = 1.06  # the most that a mini-batch may take where stages sleep, over the ideal
# Times the better of torch's GPipe and 1F1B: at A = 2, at 4, and each at its own best (None).
AIMS: tuple[tuple[str, dict[int | None, float]], ...] = (
    ("spectrain", {2: 1.2, 4: 1.2, None: 1.05}),
    ("dtrp", {2: 1.05, 4: 1.05, None: 0.95}),
)


def _line(lines: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    (found,) = [line for line in lines if all(line[key] == value for key, value in wanted.items())]
    return found


def _median(lines: list[dict[str, Any]], **wanted: Any) -> float:
    return float(_line(lines, **wanted)["median_ms"])


def _faster(contender: str, stages: int, lines: list[dict[str, Any]] = SLEEPING) -> str:
    """Times as fast as torch's 1F1B."""
    one, other = (_median(lines, contender=name, stages=stages) for name in ("torch 1F1B", contender))
    return f"{one / other:.2f}"


def _lost(contender: str, latency: float, lines: list[dict[str, Any]] = LINKS) -> float:
    """Per cent of throughput that a latency costs."""
    here, there = (_median(lines, contender=contender, latency_ms=ms) for ms in (0.0, latency))
    return 100 * (1 - here / there)


def _times() -> tuple[float, float]:
    return SLEEPING[0]["forward_ms"], SLEEPING[0]["backward_ms"]


def readme() -> list[str]:
    forward, backward = _times()
    faster = [_faster(name, stages) for name in ("dtrp", "fdg") for stages in SIZES]
    assert _lost("dtrp", forward / 2) < 0.5
    assert _lost("fdg", forward / 2) < 0.5
    return [f"{forward:g}", f"{backward:g}", *faster, f"{_lost('bp', forward / 2):.0f}"]


HEAD = ("K", "dtrp / (2F+B)", "fdg / (F+B)", "spectrain / (F+B)", "dtrp, fdg against 1F1B")


def _with_spread(line: dict[str, Any], form: str, unit: float = 1.0) -> str:
    """The median, and the least and the largest round, in units of so many ms."""
    least, median, most = (
        format(ms / unit, form) for ms in (min(line["rounds_ms"]), line["median_ms"], max(line["rounds_ms"]))
    )
    return f"{median} [{least}, {most}]"


def _over(lines: list[dict[str, Any]], stages: int) -> list[str]:
    over = [
        _with_spread(_line(lines, contender=name, stages=stages), ".3f", _ideal(name))
        for name in ("dtrp", "fdg", "spectrain")
    ]
    return [str(stages), *over, f"{_faster('dtrp', stages, lines)}, {_faster('fdg', stages, lines)}"]


def sleeping() -> str:
    assert _over_the_target(SLEEPING) == [("spectrain", 8)], "the document says which are over it"
    lines = [[*_over(SLEEPING, stages), _faster("torch InterleavedZeroBubble", stages)] for stages in SIZES]
    return table([*HEAD, "zero bubble against 1F1B"], lines)


def _ideal(method: str) -> float:
    forward, backward = _times()
    return (2 if method == "dtrp" else 1) * forward + backward


def _over_the_target(lines: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return [
        (method, stages)
        for method in ("dtrp", "fdg", "spectrain")
        for stages in SIZES
        if _median(lines, contender=method, stages=stages) / _ideal(method) > TARGET
    ]


def runs_sleeping() -> list[str]:
    """The target; then spectrain at K = 4 in every run, the oldest first, and at K = 8."""
    runs = [[line for line in _SLEEPING if line["run"] == name] for name in _names(_SLEEPING)]
    over = {method for run in runs for method, _ in _over_the_target(run)}
    assert over == {"spectrain"}, "the document says that dtrp and fdg are within it in every run"
    return [
        str(TARGET),
        *(
            f"{_median(run, contender='spectrain', stages=stages) / _ideal('spectrain'):.3f}"
            for stages in (4, 8)
            for run in runs
        ),
    ]


def fifo() -> str:
    assert not _over_the_target(FIFO), "the document says that all are within it"
    return table(HEAD, [_over(FIFO, stages) for stages in SIZES])


def cold() -> list[str]:
    row = rows("throughput/results/cold.jsonl")[-1]
    return [f"{row['at_once_ms']:.2f}", f"{row['after_sleep_ms']:.2f}", f"{row['slept_ms']:g}"]


def links() -> str:
    lines = []
    for name, label, parts in (
        ("dtrp", "dtrp", 1),
        ("dtrp-1f1b", "dtrp-1f1b", 1),
        ("fdg", "fdg", 1),
        ("bp", "bp (1F1B-flush)", 4),
    ):
        lines.append([label, str(parts), *(f"{_lost(name, ms):.1f}" for ms in (10.0, 18.0, 40.0, 80.0))])
    return table(["", "A", "10 ms (F/2)", "18 ms (0.9 F)", "40 ms", "80 ms"], lines)


def tun() -> str:
    labels = {"dtrp": "dtrp", "fdg": "fdg", "bp": "bp (1F1B-flush)", "torch 1F1B": "torch 1F1B"}
    lines = [[label, *(f"{_lost(name, ms, TUN):.1f}" for ms in (10.0, 18.0))] for name, label in labels.items()]
    return table(["", "10 ms (F/2)", "18 ms (0.9 F)"], lines)


def _compute(lines: list[dict[str, Any]], sizes: tuple[int, ...]) -> str:
    alone = _median(lines, contender="one worker")
    written = []
    for contender in dict.fromkeys(line["contender"] for line in lines if line["stages"] > 1):
        cells = []
        for parts in sizes:
            found = [x for x in lines if (x["contender"], x["num_microbatches"]) == (contender, parts)]
            cells.append(f"{_with_spread(found[0], '.0f')} ({alone / found[0]['median_ms']:.2f})" if found else "")
        written.append([contender, *cells])
    return table(["", *(f"A={parts}" for parts in sizes)], written)


def resnet20() -> str:
    assert (_missed(COMPUTE_20), _missed(BEFORE_20)) == ([("spectrain", 4)], []), "the document says which are missed"
    return _compute(COMPUTE_20, (1, 2, 4, 8))


def resnet56() -> str:
    assert not _missed(TABLE_56), "the document says that all are met"
    return _compute(TABLE_56, (1, 2, 4, 8))


def channels_last() -> str:
    assert _missed(CHANNELS_LAST) == [("dtrp", 4)], "the document says which is missed"
    return _compute(CHANNELS_LAST, (2, 4, 8))


def _missed(run: list[dict[str, Any]]) -> list[tuple[str, int | None]]:
    return [
        (method, parts)
        for method, aims in AIMS
        for parts, aim in aims.items()
        if _against_torch(run, method, parts) < aim
    ]


def _against_torch(run: list[dict[str, Any]], method: str, parts: int | None) -> float:
    """Times the better of GPipe and 1F1B, with as many micro-batches, or each at its own best number of them."""

    def best(name: str) -> float:
        own = [line for line in run if line["contender"] == name and parts in (None, line["num_microbatches"])]
        return min(float(line["median_ms"]) for line in own)

    return min(best("torch GPipe"), best("torch 1F1B")) / best(method)


def _all_against_torch(run: list[dict[str, Any]]) -> list[str]:
    """spectrain and dtrp at A = 2, at 4, and at each one's best."""
    return [f"{_against_torch(run, method, parts):.2f}" for parts in (2, 4, None) for method, _ in AIMS]


def against_torch_56() -> list[str]:
    assert {len(line["rounds_ms"]) for line in TABLE_56} == {5}, "the document says how many rounds"
    return _all_against_torch(TABLE_56)


def runs_56() -> list[str]:
    """At A = 4 in every run, the oldest first, and at the best A where there is A = 8: spectrain, then dtrp."""
    whole = [run for run in _runs_56() if {("spectrain", 8), ("dtrp", 8)} <= {_of(line) for line in run}]
    assert [not _missed(run) for run in whole] == [False, False, False, True, True], "the document says which meet all"
    shown = []
    for parts, tried in ((4, 4), (None, 8)):
        for method, _ in AIMS:
            for run in _runs_56():
                if (method, tried) in map(_of, run):
                    shown.append(f"{_against_torch(run, method, parts):.2f}")
    return shown


def _of(line: dict[str, Any]) -> tuple[str, int]:
    return line["contender"], line["num_microbatches"]


def _runs_56() -> list[list[dict[str, Any]]]:
    return [[line for line in _COMPUTE_56 if line["run"] == name] for name in _names(_COMPUTE_56)]


def _names(lines: list[dict[str, Any]]) -> list[str]:
    """Of the runs, the oldest first."""
    return list(dict.fromkeys(line["run"] for line in lines))


def _of_all_layers(run: list[dict[str, Any]]) -> tuple[float, float]:
    """F and B, in ms."""
    forwards, backwards = zip(*run[0]["layer_ms"], strict=True)
    return sum(forwards), sum(backwards)


def forwards_56() -> list[str]:
    """F over F+B of all layers: the least and the largest of the first four runs, and of the others."""
    shares = []
    for run in _runs_56():
        forward, backward = _of_all_layers(run)
        shares.append(forward / (forward + backward))
    return [f"{share:.2f}" for part in (shares[:4], shares[4:]) for share in (min(part), max(part))]


def against_torch_channels_last() -> list[str]:
    return _all_against_torch(CHANNELS_LAST)


def division_56() -> list[str]:
    """Of the cut that the layers' times say is best: by how many per cent the longer stage is over an even half.

    The least and the largest of all runs; for dtrp, whose first stage repeats its forward, and then for what recomputes
    nothing.
    """
    shown = []
    for forwards in (2, 1):
        over = []
        for run in _runs_56():
            times = run[0]["layer_ms"]
            stages = [
                (sum(forwards * f + b for f, b in times[:cut]), sum(f + b for f, b in times[cut:]))
                for cut in range(1, len(times))
            ]
            best = min(stages, key=max)
            over.append(100 * (2 * max(best) / sum(best) - 1))
        shown += [f"{min(over):.1f}", f"{max(over):.1f}"]
    return shown


def even_56() -> list[str]:
    """By the layers' times of the last run, were all divided evenly: dtrp over a synchronous schedule at A = 4 and 8."""
    forward, backward = _of_all_layers(TABLE_56)
    # dtrp's first stage has a share s of the layers: s (2F+B) = (1-s) (F+B).
    whole, again = forward + backward, 2 * forward + backward
    slot = again * whole / (again + whole)
    return [f"{whole / 2 * (1 + 1 / parts) / slot:.2f}" for parts in (4, 8)]


def one_worker_20() -> list[str]:
    return [f"{_median(run, contender='one worker'):.0f}" for run in (COMPUTE_20, BEFORE_20)]


def against_torch_20() -> list[str]:
    """spectrain at A = 4."""
    return [f"{_against_torch(run, 'spectrain', 4):.2f}" for run in (COMPUTE_20, BEFORE_20)]


def one_worker_56() -> list[str]:
    return [f"{TABLE_56[0]['load_before']:.1f}", f"{_median(TABLE_56, contender='one worker'):.0f}"]


def one_worker_channels_last() -> list[str]:
    return [f"{_median(CHANNELS_LAST, contender='one worker'):.0f}"]
