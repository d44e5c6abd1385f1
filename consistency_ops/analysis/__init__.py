"""Diagnostics of networks: layer statistics, conditioning, residual propagation, Lipschitz certificates."""

from .activation_statistics import activation_statistics
from .conditioning import condition_number, conditioning
from .examination import analyse
from .gradient_energy import gradient_energy
from .lipschitz import certified_radius, lipschitz_bound
from .propagation import propagation
from .recorder import Recorder
from .weight_domination import weight_domination

__all__ = [
    "Recorder",
    "activation_statistics",
    "analyse",
    "certified_radius",
    "condition_number",
    "conditioning",
    "gradient_energy",
    "lipschitz_bound",
    "propagation",
    "weight_domination",
]
