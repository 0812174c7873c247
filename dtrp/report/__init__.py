"""Pictures of runs: `dtrp report` makes one HTML file of runs and comparisons, and each figure as SVG and PNG."""

from .collect import Collection, Run, collect
from .page import write_report

__all__ = ["Collection", "Run", "collect", "write_report"]
