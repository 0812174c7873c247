"""What the documents show of the last run of each version."""

from shown import rows, table

LAST = {row["torch"].partition("+")[0]: row for row in rows("versions/results/versions.jsonl")}
ORDER = sorted(LAST, key=lambda version: [int(part) for part in version.split(".")])
LINE = "{version} | {passed} | {failed} | {skipped}"
TABLES = [table("torch | passed | failed | skipped", [LINE.format(version=name, **LAST[name]) for name in ORDER])]
TEXTS: dict[str, str] = {}
