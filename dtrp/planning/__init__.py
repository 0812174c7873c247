"""Plans: where to cut, what to keep, how large a batch, what to expect; and a simulator to look further."""

from ..errors import PlanError
from .balance import balance
from .choose import plan
from .link_probe import LinkSpeed, measure_link
from .orders import FoundOrder, Parts, find_orders
from .plan_file import Choice, Plan, StagePlan
from .profile import LayerProfile, Profile, Profiler
from .simulate import SimulatedSpan, Simulation, simulate

__all__ = [
    "Choice",
    "FoundOrder",
    "LayerProfile",
    "LinkSpeed",
    "Parts",
    "Plan",
    "PlanError",
    "Profile",
    "Profiler",
    "SimulatedSpan",
    "Simulation",
    "StagePlan",
    "balance",
    "find_orders",
    "measure_link",
    "plan",
    "simulate",
]
