"""Hamiltonian neural networks (arXiv 1906.01563) as pure functions: fields, solvers, networks, losses, data.

from hnn import field, rollout, hnn, derivative_matching
"""

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
