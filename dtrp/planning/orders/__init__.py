"""Static periodic orders of work for measured times, on the frontier of slot length against largest delay."""

from .finding import FoundOrder, find_orders
from .greedy import Parts

__all__ = ["FoundOrder", "Parts", "find_orders"]
