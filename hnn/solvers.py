"""Symplectic integrators as diffrax solvers, and one way to roll a field out.

`StormerVerlet` and `Yoshida4` need a separable H = T(p) + V(q), given as the pair of terms
(ODETerm(q' of p), ODETerm(p' of q)) with state (q, p), exactly as `diffrax.SemiImplicitEuler` takes it;
`separable_terms` makes the pair. `ImplicitMidpoint` takes any field, so a learned non-separable H can be
integrated symplectically. All three are symmetric in time, and keep their structure only at a constant step.
Hairer, Lubich and Wanner, Geometric Numerical Integration, chapters II and VI.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optimistix
from jax import Array
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike

SeparableTerms = tuple[diffrax.ODETerm, diffrax.ODETerm]

_CUBE_ROOT_2 = 2.0 ** (1 / 3)
_YOSHIDA_OUTER = 1 / (2 - _CUBE_ROOT_2)
_YOSHIDA_INNER = -_CUBE_ROOT_2 / (2 - _CUBE_ROOT_2)


class _Splitting(diffrax.AbstractSolver):
    """Alternate drifts of q at fixed p and kicks of p at fixed q; one drift more than kicks."""

    term_structure: ClassVar = (diffrax.ODETerm, diffrax.ODETerm)
    interpolation_cls: ClassVar = diffrax.LocalLinearInterpolation
    drifts: ClassVar[tuple[float, ...]]
    kicks: ClassVar[tuple[float, ...]]

    def init(self, terms, t0, t1, y0, args):
        del terms, t0, t1, y0, args

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        del solver_state, made_jump
        position_term, momentum_term = terms
        # The controls, not t1 - t0, know whether diffrax runs backwards in time.
        position_dt, momentum_dt = position_term.contr(t0, t1), momentum_term.contr(t0, t1)
        q, p = y0
        elapsed = 0.0
        for drift, kick in zip(self.drifts, (*self.kicks, 0.0), strict=True):
            t = t0 + elapsed * (t1 - t0)
            q = _advance(q, position_term.vf_prod(t, p, args, drift * position_dt))
            elapsed += drift
            t = t0 + elapsed * (t1 - t0)
            if kick:
                p = _advance(p, momentum_term.vf_prod(t, q, args, kick * momentum_dt))
        y1 = (q, p)
        return y1, None, dict(y0=y0, y1=y1), None, diffrax.RESULTS.successful

    def func(self, terms, t0, y0, args):
        position_term, momentum_term = terms
        q, p = y0
        return position_term.vf(t0, p, args), momentum_term.vf(t0, q, args)


class StormerVerlet(_Splitting):
    """Position Verlet (Strang splitting): order 2, one evaluation of the force a step. Separable H only."""

    drifts: ClassVar = (0.5, 0.5)
    kicks: ClassVar = (1.0,)

    def order(self, terms):
        del terms
        return 2


class Yoshida4(_Splitting):
    """Three Verlet steps of lengths w1, w0, w1, the middle one backwards (Yoshida 1990): order 4."""

    drifts: ClassVar = (
        _YOSHIDA_OUTER / 2,
        (_YOSHIDA_OUTER + _YOSHIDA_INNER) / 2,
        (_YOSHIDA_OUTER + _YOSHIDA_INNER) / 2,
        _YOSHIDA_OUTER / 2,
    )
    kicks: ClassVar = (_YOSHIDA_OUTER, _YOSHIDA_INNER, _YOSHIDA_OUTER)

    def order(self, terms):
        del terms
        return 4


class ImplicitMidpoint(diffrax.AbstractSolver):
    """y1 = y0 + dt f((y0 + y1) / 2): order 2, symplectic for every H, and keeps quadratic invariants.

    Each step is solved by Newton's method to rounding error, in float32 and float64. A step whose solve fails
    (dt far too large, or a field that is not finite) ends the solution with a `diffrax.RESULTS` that says so.
    """

    term_structure: ClassVar = diffrax.ODETerm
    interpolation_cls: ClassVar = diffrax.LocalLinearInterpolation
    newton_max_steps: int = 20

    def order(self, terms):
        del terms
        return 2

    def init(self, terms, t0, t1, y0, args):
        del terms, t0, t1, y0, args

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        del solver_state, made_jump
        t_middle = t0 + (t1 - t0) / 2
        half_dt = terms.contr(t0, t1) / 2
        flat_y0, unravel = ravel_pytree(y0)
        first_guess, _ = ravel_pytree(terms.vf_prod(t0, y0, args, half_dt))
        # The unknown is (midpoint - y0) in units of the state, so that one tolerance serves every scale of y.
        tiny = jnp.finfo(flat_y0.dtype).tiny
        size = jax.lax.stop_gradient(jnp.max(jnp.abs(flat_y0)) + jnp.max(jnp.abs(first_guess)) + tiny)

        def residual(shift: Array, inputs: Any) -> Array:
            terms, t_middle, half_dt, flat_y0, size, args = inputs
            middle = unravel(flat_y0 + size * shift)
            increment, _ = ravel_pytree(terms.vf_prod(t_middle, middle, args, half_dt))
            return increment / size - shift

        # Newton is quadratic: a last correction of eps^(2/3) leaves an error below eps, while a tolerance
        # near eps itself could be missed for ever by rounding.
        tolerance = float(jnp.finfo(flat_y0.dtype).eps) ** (2 / 3)
        solution = optimistix.root_find(
            residual,
            optimistix.Newton(rtol=tolerance, atol=tolerance),
            first_guess / size,
            args=(terms, t_middle, half_dt, flat_y0, size, args),
            max_steps=self.newton_max_steps,
            throw=False,
        )
        y1 = unravel(flat_y0 + 2 * size * solution.value)
        result = diffrax.RESULTS.promote(solution.result)
        return y1, None, dict(y0=y0, y1=y1), None, result

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)


def separable_terms(hamiltonian: Callable[[Array, Array], Array]) -> SeparableTerms:
    """Terms of a separable H(q, p) = T(p) + V(q) for `StormerVerlet`, `Yoshida4` and `SemiImplicitEuler`.

    Each half of the gradient is taken with the other variable at zero, so an H that is not separable is
    silently replaced by H(q, 0) + H(0, p): use `ImplicitMidpoint` for such an H.
    """

    def velocity(t: Any, p: Array, args: Any) -> Array:
        del t, args
        return jax.grad(hamiltonian, argnums=1)(jnp.zeros_like(p), p)

    def force(t: Any, q: Array, args: Any) -> Array:
        del t, args
        return -jax.grad(hamiltonian, argnums=0)(q, jnp.zeros_like(q))

    return diffrax.ODETerm(velocity), diffrax.ODETerm(force)


def rollout(
    field: Callable[[Array], Array] | SeparableTerms,
    y0: Array,
    ts: ArrayLike,
    *,
    solver: diffrax.AbstractSolver | None = None,
    dt: float | None = None,
    rtol: float = 1e-9,
    atol: float = 1e-9,
    max_steps: int = 100_000,
    adjoint: diffrax.AbstractAdjoint | None = None,
) -> Array:
    """Follow a field from y0 [2n] at ts[0]: the states [T, 2n] at the times ts [T], increasing or decreasing.

    `field` maps y to y', or is the pair of `separable_terms` for the splitting solvers; `solver` defaults to
    Tsit5. Without `dt` the steps adapt to `rtol` and `atol` (not below what the dtype can resolve), which
    needs an adaptive solver. With `dt`, every interval of ts is divided into equal steps of at most `dt`, so
    that samples fall on steps; then ts must be concrete (not traced) and `max_steps` does not count.
    Nothing is raised on failure: from where the solution diverged, or steps ran out, values are inf or nan.
    Differentiable in reverse mode; `adjoint` defaults to diffrax's checkpointing. For batches vmap over y0.
    """
    y0 = jnp.asarray(y0)
    terms, state0 = _terms_and_state(field, y0)
    if dt is None:
        resolution = 10 * float(jnp.finfo(y0.dtype).eps)
        controller = diffrax.PIDController(rtol=max(rtol, resolution), atol=max(atol, resolution))
    else:
        grid = step_grid(np.asarray(ts), dt)
        controller = diffrax.StepTo(jnp.asarray(grid, y0.dtype))
        max_steps = len(grid) - 1
    ts = jnp.asarray(ts, y0.dtype)
    solution = diffrax.diffeqsolve(
        terms,
        diffrax.Tsit5() if solver is None else solver,
        t0=ts[0],
        t1=ts[-1],
        dt0=None,
        y0=state0,
        saveat=diffrax.SaveAt(ts=ts),
        stepsize_controller=controller,
        adjoint=diffrax.RecursiveCheckpointAdjoint() if adjoint is None else adjoint,
        max_steps=max_steps,
        throw=False,
    )
    ys: Any = solution.ys
    return jnp.concatenate(ys, axis=-1) if isinstance(field, tuple) else ys


def step_grid(ts: np.ndarray, dt: float) -> np.ndarray:
    """Every interval of ts divided into the fewest equal steps that are no longer than dt > 0."""
    if not dt > 0:
        raise ValueError(f"dt must be positive, not {dt}")
    # The slack keeps an interval of 10 dt, computed in floating point, from becoming 11 steps.
    counts = np.maximum(1, np.ceil(np.abs(np.diff(ts)) / dt - 1e-6)).astype(int)
    pieces = [np.linspace(a, b, n, endpoint=False) for a, b, n in zip(ts[:-1], ts[1:], counts, strict=True)]
    return np.concatenate([*pieces, ts[-1:]])


def _advance(y: Any, increment: Any) -> Any:
    return jax.tree.map(jnp.add, y, increment)


def _terms_and_state(field: Callable[[Array], Array] | SeparableTerms, y0: Array) -> tuple[Any, Any]:
    if isinstance(field, tuple):
        return field, tuple(jnp.split(y0, 2))
    return diffrax.ODETerm(lambda t, y, args: field(y)), y0
