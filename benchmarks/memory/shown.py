"""What the documents show of the raw files in results/."""

from shown import Rows, join, pivot, rows, table

# Cells, of their one row, and a line.
TOLD, DEVICE = "{0[0][sum]:.1f} ({0[0][largest]:.1f})".format, "{0[0][device]:.1f} ({0[0][sum]:.1f})".format
RANKS = "`{method}` | {stages} | {grown} | {told}".format_map
HEAD, LABEL = "K=1 | K=2 | K=4 | K=8", "{model}, `{method}`"


def read(part: str) -> Rows:
    """With the memory of the stages in MB, and that of the one process on a GPU."""
    found = rows(f"memory/results/{part}.jsonl")
    found.sort(key=lambda row: len(row["model"]))  # the smallest network first
    for row in found:
        grown = [(process["rss_peak"] - process["rss_before"]) / 1e6 for process in row["processes"]]
        told = [size / 1e6 for size in row["peak_bytes"]]
        row["grown"], row["told"] = join(grown, ".1f", ", "), join(told, ".1f", ", ")
        row["sum"], row["largest"] = sum(told), max(told)
        row["device"] = row["processes"][0].get("device_peak", 0) / 1e6
    return found


def eighths(found: Rows, model: str, size: str) -> list[float]:
    """One worker, and dtrp and fdg at K=8."""
    runs = (("bp", 1), ("dtrp", 8), ("fdg", 8))
    return [found.only(model=model, method=method, stages=stages)[size] for method, stages in runs]


def outside() -> Rows:
    """What the system counts: of all processes and, in brackets, of the largest, in MB."""
    found = rows("memory/results/outside.jsonl")
    for row in found:
        grown = [(process["rss_peak"] - process["rss_before"]) / 1e6 for process in row["processes"]]
        row["all"], row["grown"] = sum(grown), f"{sum(grown):.0f} ({max(grown):.0f})"
    found.sort(key=lambda row: row["model"])
    return found


GROWN = "{0[0][grown]}".format
CONTENDER = "{model}, `{name}`"
OUTSIDE, LARGE = (outside().where(batch_size=size) for size in (16, 64))
OUTSIDE_CUT = Rows(row for row in OUTSIDE if row["num_microbatches"] == row["stages"] > 1)
LOCAL, GPU = (read(part).where(num_microbatches=1) for part in ("local", "gpu"))
CUT = Rows(row for row in read("local") if row["num_microbatches"] == row["stages"] > 1)
TABLES = [
    pivot(f"one micro-batch | {HEAD}", LOCAL, LABEL, "stages", (1, 2, 4, 8), TOLD),
    pivot(f"as many micro-batches as stages | {HEAD[6:]}", CUT, LABEL, "stages", (2, 4, 8), TOLD),
    pivot(f"on an H100 | {HEAD}", GPU, LABEL, "stages", (1, 2, 4, 8), DEVICE),
    pivot(f"as the system counts, one micro-batch | {HEAD}", OUTSIDE.where(num_microbatches=1), CONTENDER, "stages",
          (1, 2, 4, 8), GROWN),
    pivot(f"as the system counts, as many micro-batches as stages | {HEAD[6:]}", OUTSIDE_CUT, CONTENDER, "stages", (2, 4, 8),
          GROWN),
    pivot(f"as the system counts, mini-batches of 64, as many micro-batches as stages | {HEAD}", LARGE, CONTENDER, "stages",
          (1, 2, 4, 8), GROWN),
    table(" | K | grown, each process | from the tensors, each stage", map(RANKS, read("ranks"))),
]  # fmt: skip
SIZES = [eighths(LOCAL, model, "sum") for model in ("resnet56", "resnet1202")]
BESIDE = [found.only(model="resnet110", method=method, stages=8) for found in (CUT, LOCAL) for method in ("bp", "dtrp")]
EIGHT = [
    found.only(model="resnet110", name=name, stages=8)["all"]
    for found in (LARGE, OUTSIDE.where(num_microbatches=1))
    for name in ("bp", "bp, checkpointed", "dtrp", "fdg")
]
ON_GPU = eighths(GPU, "resnet1202", "device")
TEXTS = {
    "local": " ".join(f"{fdg / one:.1f} {dtrp / one:.1f}" for one, dtrp, fdg in SIZES),
    "gpu": f"{ON_GPU[2] / ON_GPU[0]:.1f} {ON_GPU[1] / ON_GPU[0]:.2f}",
    "readme": join([row["largest"] for row in BESIDE], ".1f"),
    "outside": join(EIGHT, ".0f"),
    "h100": join([GPU.only(model="resnet1202", method="bp", stages=8)["device"], *ON_GPU[1:], ON_GPU[0]], ".1f"),
}
