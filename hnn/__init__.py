"""Hamiltonian neural networks (arXiv 1906.01563) as pure functions: fields, solvers, networks, losses, data.

from hnn import field, rollout, hnn, derivative_matching
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hnn.data import Dataset, Trajectories, load_npz, load_real_pendulum, simulate, simulate_films
    from hnn.loss import derivative_matching, latent_dynamics, next_observation
    from hnn.model import FieldModel, PixelModel, SequenceModel, baseline, dissipative, hnn, separable
    from hnn.shooting import multiple_shooting, segments
    from hnn.solvers import ImplicitMidpoint, StormerVerlet, Yoshida4, rollout, separable_terms
    from hnn.systems import SYSTEMS, System, field, system_field, total_energy

__all__ = [
    "SYSTEMS",
    "Dataset",
    "FieldModel",
    "ImplicitMidpoint",
    "PixelModel",
    "SequenceModel",
    "StormerVerlet",
    "System",
    "Trajectories",
    "Yoshida4",
    "baseline",
    "derivative_matching",
    "dissipative",
    "field",
    "hnn",
    "latent_dynamics",
    "load_npz",
    "load_real_pendulum",
    "multiple_shooting",
    "next_observation",
    "rollout",
    "segments",
    "separable",
    "separable_terms",
    "simulate",
    "simulate_films",
    "system_field",
    "total_energy",
]

_MODULES = ("systems", "solvers", "model", "data", "loss", "shooting")


def __getattr__(name: str) -> Any:
    """Imported at first use: a mistake on the command line need not wait for diffrax."""
    if name in __all__:
        for module in _MODULES:
            found = import_module(f"hnn.{module}")
            if name in vars(found):
                return vars(found)[name]
    raise AttributeError(f"module 'hnn' has no attribute {name!r}")
