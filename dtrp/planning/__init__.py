"""Plans: where to cut, what to keep, how large a batch, what to expect; and a simulator to look further."""

from .balance import PlanError, balance
from .simulate import SimulatedSpan, Simulation, simulate

__all__ = ["PlanError", "SimulatedSpan", "Simulation", "balance", "simulate"]
