"""The original recipe for Hamiltonian networks (Greydanus et al. 2019, arXiv:1906.01563) in PyTorch.

The network, initialisation, optimiser, batches and evaluation solver are those of the authors' code; data
come in as numpy arrays, so that every implementation compared sees the same ones. Coordinates are canonical:
[all q, all p]. Training is float32 on the CPU, on as many threads as `torch.set_num_threads` says.

The authors' loops also do, in every step, what only costs time: a pass over test data, gradients with respect
to the data set, whose tensor requires them, and in the two-body loop a copy of all gradients for the log and noise
of scale zero. The argument `as_shipped` says whether to do so here.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor, nn

Kind = Literal["hnn", "baseline"]
Array = np.ndarray

HIDDEN_DIM = 200
LEARNING_RATE = 1e-3
TWO_BODY_PUBLISHED_TEST_LOSS = 2.8218e-6


class MLP(nn.Module):
    """in -> 200 -> 200 -> out with tanh, orthogonal weights, torch's default biases, no bias at the end."""

    def __init__(self, in_dim: int, out_dim: int, hidden_dim: int = HIDDEN_DIM):
        super().__init__()
        self.first = nn.Linear(in_dim, hidden_dim)
        self.second = nn.Linear(hidden_dim, hidden_dim)
        self.last = nn.Linear(hidden_dim, out_dim, bias=False)
        for layer in (self.first, self.second, self.last):
            nn.init.orthogonal_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Baseline(nn.Module):
    """The plain network: x' [b, dim] straight from x [b, dim]."""

    def __init__(self, dim: int):
        super().__init__()
        self.net = MLP(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class HamiltonianNet(nn.Module):
    """x' = M grad H(x), M = [[0, I], [-I, 0]] (eq. 3); H is the second of two outputs, the first unused."""

    def __init__(self, dim: int):
        super().__init__()
        self.net = MLP(dim, 2)
        half = dim // 2
        identity = torch.eye(dim)
        self.register_buffer("symplectic", torch.cat([identity[half:], -identity[:half]]))

    def forward(self, x: Tensor) -> Tensor:
        """x [b, dim], which must require gradients -> x' [b, dim], differentiable in the weights."""
        hamiltonian = self.net(x)[:, 1]
        (gradient,) = torch.autograd.grad(hamiltonian.sum(), x, create_graph=True)
        return gradient @ self.symplectic.T


@dataclass(frozen=True)
class TorchRun:
    """One training run.

    `steps`, `test_losses` and `wall_s` [k] are the curve: after `steps[i]` steps, which took `wall_s[i]`
    seconds, the mean squared error on the whole test set was `test_losses[i]`. Measuring the curve is not
    in the seconds.
    """

    model: nn.Module
    steps: Array
    test_losses: Array
    wall_s: Array
    train_loss: float
    median_step_s: float


@dataclass(frozen=True)
class TimeToLoss:
    """`wall_s` and `step` when the test loss first was at most `target`, both None when it never was.

    `run_wall_s` and `run_steps` say how long the run went on, `best_test_loss` the lowest value it met.
    """

    target: float
    wall_s: float | None
    step: int | None
    run_wall_s: float
    run_steps: int
    best_test_loss: float


def make_model(kind: Kind, dim: int, seed: int) -> nn.Module:
    """The network for states of `dim` numbers, initialised from `seed`, torch's global one untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return HamiltonianNet(dim) if kind == "hnn" else Baseline(dim)


def make_step(
    model: nn.Module,
    x: Array,
    dx: Array,
    x_test: Array,
    dx_test: Array,
    *,
    batch_size: int | None,
    weight_decay: float,
    seed: int,
    as_shipped: bool,
) -> Callable[[], float]:
    """One step of the recipe as a function: it updates `model` in place and returns the training loss.

    x, dx [n, dim], x_test, dx_test [m, dim]; `batch_size` None is the full batch. Batches are the first
    entries of a fresh permutation of the whole set, and so is the test batch of each step, as originally.
    """
    optimiser = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, weight_decay=weight_decay)
    parameters = list(model.parameters())
    generator = torch.Generator().manual_seed(seed)
    train_x, train_dx, test_x, test_dx = (_float32(a) for a in (x, dx, x_test, dx_test))
    if as_shipped:
        train_x.requires_grad_()
        test_x.requires_grad_()

    def draw(states: Tensor, derivatives: Tensor) -> tuple[Tensor, Tensor]:
        if batch_size is not None:
            rows = torch.randperm(len(states), generator=generator)[:batch_size]
            states, derivatives = states[rows], derivatives[rows]
        return states if as_shipped else states.detach().requires_grad_(), derivatives

    def squared_error(states: Tensor, derivatives: Tensor) -> Tensor:
        states, derivatives = draw(states, derivatives)
        predicted = model(states)
        if as_shipped and batch_size is not None:
            predicted = predicted + 0.0 * torch.randn(states.shape, generator=generator)
        return (derivatives - predicted).pow(2).mean()

    def step() -> float:
        loss = squared_error(train_x, train_dx)
        loss.backward(inputs=None if as_shipped else parameters)
        if as_shipped and batch_size is not None:
            torch.cat([p.grad.flatten() for p in parameters]).clone()
        optimiser.step()
        optimiser.zero_grad()
        if as_shipped:
            squared_error(test_x, test_dx).item()
        return loss.item()

    return step


def mean_squared_error(model: nn.Module, x: Array, dx: Array) -> float:
    """Mean over all elements of (x' predicted - dx)^2, in one pass over x, dx [n, dim]."""
    return (_float32(dx) - model(_float32(x).requires_grad_())).pow(2).mean().item()


def train(
    kind: Kind,
    x: Array,
    dx: Array,
    x_test: Array,
    dx_test: Array,
    *,
    steps: int,
    batch_size: int | None,
    weight_decay: float,
    seed: int,
    as_shipped: bool,
    curve_every: int = 100,
) -> TorchRun:
    """Train for `steps` steps, with the test loss on the curve every `curve_every` steps and at the end."""
    model = make_model(kind, x.shape[1], seed)
    step = make_step(
        model,
        x,
        dx,
        x_test,
        dx_test,
        batch_size=batch_size,
        weight_decay=weight_decay,
        seed=seed,
        as_shipped=as_shipped,
    )
    step_s = np.empty(steps)
    curve = []
    for i in range(steps):
        started = time.perf_counter()
        step()
        step_s[i] = time.perf_counter() - started
        if (i + 1) % curve_every == 0 or i + 1 == steps:
            curve.append((i + 1, mean_squared_error(model, x_test, dx_test), step_s[: i + 1].sum()))
    at, losses, wall_s = (np.array(column) for column in zip(*curve, strict=True))
    return TorchRun(model, at, losses, wall_s, mean_squared_error(model, x, dx), float(np.median(step_s)))


def timed_blocks(
    kind: Kind,
    x: Array,
    dx: Array,
    x_test: Array,
    dx_test: Array,
    *,
    batch_size: int | None,
    weight_decay: float,
    seed: int,
    as_shipped: bool,
    steps_per_block: int = 100,
    warm_up_steps: int = 50,
) -> Iterator[float]:
    """Seconds of one block of `steps_per_block` steps after another, without end, after an untimed warm-up.

    A generator, so that a caller can take blocks of two implementations in turn, on the same machine load.
    """
    step = make_step(
        make_model(kind, x.shape[1], seed),
        x,
        dx,
        x_test,
        dx_test,
        batch_size=batch_size,
        weight_decay=weight_decay,
        seed=seed,
        as_shipped=as_shipped,
    )
    for _ in range(warm_up_steps):
        step()
    while True:
        started = time.perf_counter()
        for _ in range(steps_per_block):
            step()
        yield time.perf_counter() - started


def time_to_loss(
    kind: Kind,
    x: Array,
    dx: Array,
    x_test: Array,
    dx_test: Array,
    *,
    target: float,
    max_steps: int,
    batch_size: int | None,
    weight_decay: float,
    seed: int,
    as_shipped: bool,
    check_every: int = 100,
) -> TimeToLoss:
    """Seconds of training until the loss on the whole test set, seen every `check_every`, meets `target`.

    The learning rate is constant, so the recipe simply goes on past its published number of steps, up to
    `max_steps`. Neither the checks nor building the model are in the seconds.
    """
    model = make_model(kind, x.shape[1], seed)
    step = make_step(
        model,
        x,
        dx,
        x_test,
        dx_test,
        batch_size=batch_size,
        weight_decay=weight_decay,
        seed=seed,
        as_shipped=as_shipped,
    )
    wall_s, done, best = 0.0, 0, float("inf")
    while done < max_steps:
        block = min(check_every, max_steps - done)
        started = time.perf_counter()
        for _ in range(block):
            step()
        wall_s += time.perf_counter() - started
        done += block
        loss = mean_squared_error(model, x_test, dx_test)
        best = min(best, loss)
        if loss <= target:
            return TimeToLoss(target, wall_s, done, wall_s, done, best)
    return TimeToLoss(target, None, None, wall_s, done, best)


def rollouts(
    model: nn.Module,
    y0: Array,
    t_span: tuple[float, float],
    t_eval: Array,
    rtol: float = 1e-9,
) -> Array:
    """Follow the learned field as the original evaluates it: y0 [n, dim], t_eval [t] -> [n, t, dim].

    One trajectory after the other through SciPy's RK45 (atol 1e-6, SciPy's default), each call of the field
    one state through the float32 network.

    Raises RuntimeError when SciPy gives up on a trajectory.
    """

    def field(_: float, y: Array) -> Array:
        state = torch.tensor(y, dtype=torch.float32).view(1, -1).requires_grad_()
        return model(state).detach().numpy().reshape(-1)

    paths = []
    for start in y0:
        solution = solve_ivp(field, t_span, start, t_eval=t_eval, rtol=rtol)
        if not solution.success:
            raise RuntimeError(f"SciPy stopped before t = {t_span[1]}: {solution.message}")
        paths.append(solution.y.T)
    return np.stack(paths)


def _float32(array: Array) -> Tensor:
    return torch.tensor(array, dtype=torch.float32)
