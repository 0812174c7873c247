"""Plans: where to cut, what to keep, how large a batch, what to expect; and a simulator to look further."""

from ..errors import PlanError
from .balance import balance
from .choose import plan
from .link_probe import LinkSpeed, measure_link
from .plan_file import Choice, Plan, StagePlan
from .profile import LayerProfile, Profile, Profiler
from .simulate import SimulatedSpan, Simulation, simulate

__all__ = [
    "Choice",
    "LayerProfile",
    "LinkSpeed",
    "Plan",
    "PlanError",
    "Profile",
    "Profiler",
    "SimulatedSpan",
    "Simulation",
    "StagePlan",
    "balance",
    "measure_link",
    "plan",
    "simulate",
]
