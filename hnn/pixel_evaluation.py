"""Measuring latent dynamics learned from films: encode one pair of frames, follow the latent field, compare.

A latent space has units of its own. Encodings of the training films are therefore regressed on the true coordinates
(an affine map, for the headline numbers, and a cubic one), and that map is applied to latent rollouts of test films.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hnn.data import Films, PixelDataset
from hnn.evaluate import Trained, energies, rollouts, with_sd
from hnn.model import PixelModel
from hnn.systems import SYSTEMS
from lib import plot

FOLLOWED = 100  # frames, as in the paper's data
_RIDGE = 1e-8


@jax.jit
def _pairs(frames: jax.Array) -> jax.Array:
    """uint8 [films, T, h, w] to stacked pairs in [0, 1], [films, T - 1, 2 h w]."""
    flat = frames.reshape(*frames.shape[:2], -1).astype(jnp.float32) / 255
    return jnp.concatenate([flat[:, :-1], flat[:, 1:]], axis=-1)


def _monomials(z: np.ndarray, degree: int) -> np.ndarray:
    return np.stack(
        [z[..., 0] ** i * z[..., 1] ** j for i in range(degree + 1) for j in range(degree + 1 - i)], axis=-1
    )


def physical_map(z: np.ndarray, y: np.ndarray, degree: int):
    """The ridge regression of y [..., 2] on monomials of standardised z [..., 2] up to `degree`, as a function."""
    flat, target = z.reshape(-1, 2), y.reshape(-1, 2)
    mean, sd = flat.mean(0), flat.std(0)
    features = _monomials((flat - mean) / sd, degree)
    gram = features.T @ features / len(flat) + _RIDGE * np.eye(features.shape[1])
    weights = np.linalg.solve(gram, features.T @ target / len(flat))
    return lambda other: _monomials((other - mean) / sd, degree) @ weights


def _encode(trained: Trained, params: Any, films: Films) -> np.ndarray:
    encode = jax.jit(lambda p, frames: trained.model.apply(p, _pairs(frames), method="encode"))
    return np.concatenate([np.asarray(encode(params, frames[None])) for frames in films.frames]).astype(np.float64)


def film_numbers(name: str, trained: Trained, data: PixelDataset) -> tuple[dict[str, float], np.ndarray]:
    """Metrics over seeds; `data` leads with seeds. Also the decoded rollouts of the first seed's test films.

    energy_mse and coordinate_mse: latent rollouts through the affine map against the truth at the same times;
    *_cubic_map: through the cubic map; energy_mse_encoded: encodings without any dynamics; energy_mse_original_recipe:
    with the paper's energy; pixel_mse: decoded rollouts against the frames.
    """
    system = SYSTEMS["pixel_pendulum"]
    seeds = data.train.frames.shape[0]
    found: dict[str, list[float]] = {}
    decoded = np.zeros(0)
    for seed in range(seeds):
        params = jax.tree.map(lambda x, seed=seed: x[seed], trained.params)
        train, test = (Films(part.t, part.frames[seed], part.y[seed]) for part in data)
        z_train, z_test = (_encode(trained, params, part) for part in (train, test))
        followed = _follow(trained, params, z_test[:, 0])
        truth = test.y[:, :FOLLOWED]
        for degree, suffix in ((1, ""), (3, "_cubic_map")):
            to_physical = physical_map(z_train, train.y[:, : z_train.shape[1]], degree)
            ys = to_physical(followed)
            found.setdefault(f"energy_mse{suffix}", []).append(_energy_error(system.hamiltonian, ys, truth))
            found.setdefault(f"coordinate_mse{suffix}", []).append(float(np.mean((ys - truth) ** 2)))
            if degree == 1:
                encoded = to_physical(z_test[:, :FOLLOWED])
                found.setdefault("energy_mse_encoded", []).append(_energy_error(system.hamiltonian, encoded, truth))
                original = _energy_error(system.original_energy, ys, truth)
                found.setdefault("energy_mse_original_recipe", []).append(original)
        shown = np.asarray(_decode(trained, params, followed))
        target = np.asarray(_pairs(test.frames))[:, :FOLLOWED]
        found.setdefault("pixel_mse", []).append(float(np.mean((shown - target) ** 2)))
        if seed == 0:
            decoded = shown
    numbers: dict[str, float] = {}
    for metric, values in found.items():
        numbers |= with_sd(f"{name}.{metric}", np.asarray(values))
    return numbers, decoded


def _energy_error(hamiltonian: Any, ys: np.ndarray, truth: np.ndarray) -> float:
    return float(np.mean((energies(hamiltonian, ys) - energies(hamiltonian, truth)) ** 2))


@functools.cache
def _latent_field(model: PixelModel) -> Any:
    """One function object per model, so that its rollouts are compiled once."""
    return lambda params, z: model.apply(params, z, method="field")


def _follow(trained: Trained, params: Any, z0: np.ndarray) -> np.ndarray:
    """Latent rollouts [n, FOLLOWED, 2] from z0 [n, 2], in float64; the latent unit of time is one frame."""
    leading = jax.tree.map(lambda x: x[None], params)
    span = np.full(len(z0), FOLLOWED - 1.0)
    return rollouts(_latent_field(trained.model), leading, z0[None], span, FOLLOWED, 1e-9)[0]


def _decode(trained: Trained, params: Any, z: np.ndarray) -> jax.Array:
    return jax.jit(lambda p, z: trained.model.apply(p, z, method="decode"))(params, jnp.asarray(z, jnp.float32))


def film_strip(path: Path, data: PixelDataset, decoded: dict[str, np.ndarray], every: int = 11) -> Path:
    """Every eleventh frame of one test film, over those that each model imagines from its first two frames."""
    frames = data.test.frames[0, 0, :FOLLOWED:every] / 255
    rows = {"film": frames}
    for name, images in decoded.items():
        half = images.shape[-1] // 2
        rows[name] = images[0, ::every, :half].reshape(-1, *frames.shape[1:]).clip(0, 1)
    captions = [f"frame {i}" for i in range(0, FOLLOWED, every)]
    return plot.image_rows(path, rows, columns=captions)
