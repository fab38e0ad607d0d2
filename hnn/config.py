"""Every default of the package. A preset is one system with the recipe that suits it; options override fields.

The paper's own recipe (constant learning rate 1e-3, 2,000 full-batch or 10,000 minibatch steps) is reproduced in
`launch/bench`; the presets train shorter or longer with a learning rate that rises and decays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from hnn.systems import SYSTEMS
from lib.process import UserError

FIELD_MODELS = ("baseline", "hnn", "hnn_rollout", "separable", "dissipative")
MODELS = (*FIELD_MODELS, "lstm")


def _require(good: bool, message: str) -> None:
    if not good:
        raise UserError(message)


@dataclass(frozen=True)
class Data:
    """Where the trajectories come from. None: what the paper has for the system."""

    path: str | None = None
    """npz written by `simulate`, or the real pendulum's text file (default: simulate, or GRADIENT_FIELDS_DATA)"""
    n_trajectories: int | None = None
    """trajectories to simulate, train and test together"""
    noise_std: float | None = None
    """standard deviation of the noise on the observed coordinates"""
    per_seed: bool = False
    """every seed draws its own data; otherwise all learn from what `simulate SYSTEM --seed SEED` writes"""

    def __post_init__(self) -> None:
        _require(self.n_trajectories is None or self.n_trajectories >= 2, "data.n_trajectories must be at least 2")
        _require(
            self.noise_std is None or (math.isfinite(self.noise_std) and self.noise_std >= 0),
            "data.noise_std must be zero or positive",
        )


@dataclass(frozen=True)
class Optim:
    """Adam; the learning rate rises over `warmup` of all steps and then falls to `final_lr` on a cosine."""

    steps: int = 2000
    """updates"""
    lr: float = 1e-3
    """peak learning rate"""
    final_lr: float = 0.0
    """learning rate after the last step, as a fraction of the peak"""
    warmup: float = 0.05
    """fraction of the steps"""
    b2: float = 0.99
    """decay of Adam's second moment"""
    weight_decay: float = 0.0
    """L2 penalty, coupled as in the paper's code"""
    batch_size: int | None = None
    """observations per step (default: all)"""

    def __post_init__(self) -> None:
        _require(self.steps >= 1, "steps must be at least 1")
        _require(math.isfinite(self.lr) and self.lr > 0, "lr must be positive")
        _require(0 <= self.final_lr <= 1, "final_lr must be between 0 and 1, a fraction of lr")
        _require(0 <= self.warmup < 1, "warmup must be at least 0 and below 1, a fraction of the steps")
        _require(0 < self.b2 < 1, "b2 must be between 0 and 1")
        _require(self.weight_decay >= 0, "weight_decay must not be negative")
        _require(self.batch_size is None or self.batch_size >= 1, "batch_size must be at least 1")


@dataclass(frozen=True)
class Derivative(Optim):
    """Derivative matching."""

    robust_scale: float | None = None
    """weigh each observation by 1 / (1 + |y'|^2 / robust_scale): close encounters no longer decide the loss"""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.robust_scale is None or self.robust_scale > 0, "derivative.robust_scale must be positive")


@dataclass(frozen=True)
class Rollout(Optim):
    """Trajectory matching by multiple shooting."""

    steps: int = 500
    lr: float = 5e-3
    final_lr: float = 0.01
    starts_lr: float = 1e-2
    """peak learning rate of the initial states of the segments"""
    segment_points: int = 15
    """samples per segment"""
    samples_per_step: int = 3
    """sampling intervals per Runge-Kutta step; samples between are interpolated"""
    continuity_start: float = 1.0
    """weight of the gaps between segments at the first step; it grows geometrically"""
    continuity_end: float = 1000.0
    """the same at the last step"""
    derivative_weight: float = 0.0
    """weight of the observed derivatives, matched along the estimated states"""
    roughness_weight: float = 0.0
    """weight of the squared third derivative of H, which makes it smooth between the trajectories"""
    dissipation_roughness_weight: float = 0.0
    """the same for the dissipative part"""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.batch_size is None, "trajectory matching uses all data in every step: leave batch_size out")
        _require(self.starts_lr > 0, "rollout.starts_lr must be positive")
        _require(self.segment_points >= 2, "rollout.segment_points must be at least 2")
        _require(
            self.samples_per_step >= 1 and self.segment_points % self.samples_per_step == 0,
            "rollout.segment_points must be a multiple of rollout.samples_per_step",
        )
        _require(min(self.continuity_start, self.continuity_end) > 0, "rollout.continuity weights must be positive")
        weights = (self.derivative_weight, self.roughness_weight, self.dissipation_roughness_weight)
        _require(min(weights) >= 0, "rollout weights must not be negative")


@dataclass(frozen=True)
class Pixels(Optim):
    """The autoencoder with latent dynamics, for pixel_pendulum."""

    steps: int = 2500
    lr: float = 2e-3
    warmup: float = 0.08
    batch_size: int | None = 48
    window: int = 5
    """consecutive frame pairs that the latent field is followed over"""
    stride: int = 2
    """frames per Runge-Kutta step in the latent space"""
    canonical_weight: float = 0.1
    """weight of p = change of q per frame"""
    dynamics_weight: float = 0.1
    """weight of the latent rollout"""
    normalized: bool = True
    """divide both by the variance of the latent coordinate, so that shrinking the latent space gains nothing"""
    gain: float = 10.0
    """the decoder sees this multiple of the latent state"""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.stride >= 1 and self.window > self.stride, "pixels.window must exceed pixels.stride, at least 1")
        _require((self.window - 1) % self.stride == 0, "pixels.window must be a multiple of pixels.stride, plus 1")
        _require(self.gain > 0, "pixels.gain must be positive")
        _require(self.window < 100, "pixels.window must be below 100")
        _require(self.batch_size is not None, "pixels.batch_size must be given")


@dataclass(frozen=True)
class Evaluation:
    """How trained fields are followed and compared."""

    t_end: float = 20.0
    """time each rollout covers"""
    n_initial: int = 50
    """fresh initial conditions inside the training range, and as many outside"""
    n_points: int = 500
    """times compared on each rollout"""
    rtol: float = 1e-8
    """relative and absolute tolerance of the adaptive solver (float64)"""
    average: Literal["mean", "median"] = "mean"
    """over initial conditions; median where a few close encounters would decide the mean"""
    sweep: bool = True
    """compare Euler and the implicit midpoint rule over step sizes"""

    def __post_init__(self) -> None:
        _require(math.isfinite(self.t_end) and self.t_end > 0, "evaluation.t_end must be positive")
        _require(self.n_initial >= 1, "evaluation.n_initial must be at least 1")
        _require(self.n_points >= 2, "evaluation.n_points must be at least 2")
        _require(1e-13 <= self.rtol < 1, "evaluation.rtol must be between 1e-13 and 1")


@dataclass(frozen=True)
class Config:
    """A study: one system, the models compared on it, and their recipes."""

    system: str = "spring"
    """one of the simulated systems, real_pendulum or pixel_pendulum"""
    models: tuple[str, ...] = ("baseline", "hnn")
    """any of baseline, hnn, hnn_rollout, separable, dissipative, lstm"""
    seeds: int = 5
    """independent repetitions: own initial weights, with data.per_seed own data too"""
    seed: int = 0
    """the root of all random numbers"""
    hidden: int = 200
    """units in each of the two hidden layers"""
    data: Data = Data()
    derivative: Derivative = Derivative()
    """derivative matching: baseline, hnn, separable"""
    rollout: Rollout = Rollout()
    """trajectory matching: hnn_rollout, dissipative"""
    sequence: Optim = Optim(steps=1000, lr=3e-3)
    """the lstm"""
    pixels: Pixels = Pixels()
    """the models of pixel_pendulum"""
    evaluation: Evaluation = Evaluation()
    checkpoint_every: int = 500
    """steps between checkpoints"""

    def __post_init__(self) -> None:
        _require(self.system in SYSTEMS, f"unknown system {self.system!r}: choose from {', '.join(SYSTEMS)}")
        _require(bool(self.models), f"models is empty: choose from {', '.join(MODELS)}")
        for name in self.models:
            _require(name in MODELS, f"unknown model {name!r}: choose from {', '.join(MODELS)}")
            _require(
                name in ("baseline", "hnn") or self.system != "pixel_pendulum",
                f"{name} cannot learn from films: pixel_pendulum has baseline and hnn",
            )
            _require(
                name != "lstm" or self.system != "real_pendulum",
                "lstm needs times on a regular grid, which real_pendulum does not have",
            )
        _require(
            self.data.path is None or self.system != "pixel_pendulum",
            "pixel_pendulum films are always simulated: leave data.path out",
        )
        _require(len(set(self.models)) == len(self.models), "models names a model twice")
        _require(1 <= self.seeds <= 1000, "seeds must be between 1 and 1000")
        _require(0 <= self.seed < 2**32, "seed must be between 0 and 2**32 - 1")
        _require(1 <= self.hidden <= 16384, "hidden must be between 1 and 16384")
        _require(self.checkpoint_every >= 1, "checkpoint_every must be at least 1")


_BODIES = Derivative(steps=5_000, lr=8e-3, batch_size=200)
_SPRING = Config(
    "spring", ("baseline", "hnn", "hnn_rollout"), data=Data(per_seed=True), rollout=Rollout(roughness_weight=3e-3)
)
_TWO_BODY = Config("two_body", derivative=_BODIES, evaluation=Evaluation(t_end=25.0))
_THREE_BODY = Config(
    "three_body",
    derivative=Derivative(steps=5_000, lr=6e-3, batch_size=300, robust_scale=10.0),
    evaluation=Evaluation(t_end=3.0, average="median"),
)
_REAL_PENDULUM = Config(
    "real_pendulum",
    ("baseline", "hnn", "dissipative"),
    derivative=Derivative(weight_decay=1e-5),
    rollout=Rollout(
        steps=400,
        segment_points=12,
        samples_per_step=1,
        continuity_start=0.1,
        continuity_end=100.0,
        roughness_weight=1e-5,
        dissipation_roughness_weight=1e-2,
    ),
)

PRESETS: dict[str, Config] = {
    "demo": replace(
        _SPRING,
        seeds=2,
        derivative=Derivative(steps=600),
        rollout=replace(_SPRING.rollout, steps=400),
        evaluation=Evaluation(n_initial=10, n_points=250, rtol=1e-6),
    ),
    "spring": _SPRING,
    "pendulum": replace(
        _SPRING,
        system="pendulum",
        # Derivatives help here and a smooth H does not: the field steepens towards the separatrix.
        rollout=Rollout(steps=800, lr=4e-3, starts_lr=2e-2, derivative_weight=3.0),
    ),
    "damped_pendulum": replace(
        _SPRING,
        system="damped_pendulum",
        models=("baseline", "hnn", "dissipative"),
        rollout=replace(_REAL_PENDULUM.rollout, segment_points=15, samples_per_step=3),
    ),
    "real_pendulum": _REAL_PENDULUM,
    "two_body": _TWO_BODY,
    "three_body": _THREE_BODY,
    "double_pendulum": Config("double_pendulum", derivative=_BODIES),
    "henon_heiles": Config("henon_heiles", ("baseline", "hnn", "separable"), derivative=_BODIES),
    "pixel_pendulum": Config("pixel_pendulum"),
}


def _original(config: Config, steps: int, batch_size: int | None, weight_decay: float) -> Config:
    """The paper's code: derivative matching alone, a constant learning rate of 1e-3, one data set."""
    plain = {"steps": steps, "lr": 1e-3, "final_lr": 1.0, "warmup": 0.0, "b2": 0.999, "weight_decay": weight_decay}
    return replace(
        config,
        models=("baseline", "hnn"),
        seeds=2,
        data=Data(),
        derivative=Derivative(**plain, batch_size=batch_size),
        pixels=Pixels(
            **plain, batch_size=batch_size or 1, window=2, stride=1, canonical_weight=1.0, normalized=False, gain=1.0
        ),
    )


PRESETS |= {
    "spring_original": _original(PRESETS["spring"], 2_000, None, 1e-4),
    "pendulum_original": _original(PRESETS["pendulum"], 2_000, None, 1e-4),
    "real_pendulum_original": _original(_REAL_PENDULUM, 2_000, None, 1e-5),
    "two_body_original": _original(_TWO_BODY, 10_000, 200, 0.0),
    "three_body_original": _original(_THREE_BODY, 10_000, 600, 0.0),
    "pixel_pendulum_original": _original(PRESETS["pixel_pendulum"], 10_000, 200, 1e-5),
}
