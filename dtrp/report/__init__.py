"""Reports of runs: `dtrp report` writes an HTML file about runs and comparisons, and its figures as SVG and PNG."""

from .collect import Collection, Run, collect
from .page import write_report

__all__ = ["Collection", "Run", "collect", "write_report"]
