"""What the documents show of the last run of each part in results/."""

from shown import join, rows, table

LAST = {part: rows(f"restarts/results/{part}.jsonl")[-1] for part in ("workers", "saving", "launcher", "elastic")}
KILLED = {
    "workers": "of a random worker, every fourth time of all",
    "saving": "of a worker in the middle of a save",
    "launcher": "of the launcher; then the same command again",
}
HEAD = "kill -9 | kills | exit code | weights equal | losses equal | s undisturbed | s with the kills"
CELLS = "{code} | {weights_equal} | {metrics_equal} | {undisturbed_s:.1f} | {elapsed_s:.1f}"
KILLS = {part: len(LAST[part].get("kills", ["the launcher"])) for part in KILLED}
TABLES = [table(HEAD, [f"{KILLED[part]} | {KILLS[part]} | {CELLS.format_map(LAST[part])}" for part in KILLED])]
TEXTS = {"elastic": join([100 * LAST["elastic"][key] for key in ("accuracy", "bp_accuracy")], ".1f")}
