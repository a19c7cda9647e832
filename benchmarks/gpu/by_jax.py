"""The Rosenbrock workload in JAX: the whole training is one compiled function, its loop a `lax.scan`."""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
from torch import nn

from benchmarks.workloads import Workload


def train(problem: nn.Module, workload: Workload, epochs: int, rounds: int, device: str) -> tuple[float, float]:
    """Seconds a step (the smallest of `rounds`), and the mean loss of the last epoch, from the weights of `problem`."""
    where = jax.devices("gpu" if device == "cuda" else "cpu")[0]
    layers = [m for m in problem.modules() if isinstance(m, nn.Linear)]
    weights = [(jnp.asarray(m.weight.detach().numpy().T), jnp.asarray(m.bias.detach().numpy())) for m in layers]
    size = workload.batch_size
    data = {k: jnp.asarray(v.cpu().numpy()).reshape(-1, size, 1) for k, v in workload.train.items()}
    weights, data = jax.device_put((weights, data), where)
    run = jax.jit(lambda w, d: _loop(w, d, epochs, workload.clip))
    losses = jax.block_until_ready(run(weights, data))  # compiles
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        losses = jax.block_until_ready(run(weights, data))
        seconds.append((time.perf_counter() - began) / losses.size)
    return min(seconds), float(losses[-1].mean())


def _loop(weights: Any, data: Any, epochs: int, clip: float) -> Any:
    zeros = jax.tree.map(jnp.zeros_like, weights)

    def epoch(state: Any, _: Any) -> Any:
        return jax.lax.scan(lambda s, batch: _step(s, batch, clip), state, data)

    return jax.lax.scan(epoch, (weights, zeros, zeros, jnp.zeros(())), None, length=epochs)[1]


def _step(state: Any, batch: Any, clip: float, lr: float = 1e-3, decay: float = 1e-2) -> Any:
    """Clipping by norm, then AdamW (arXiv:1711.05101), as torch has them."""
    weights, first, second, count = state
    loss, grads = jax.value_and_grad(_loss)(weights, batch)
    norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))
    grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, clip / (norm + 1e-6)), grads)
    count = count + 1
    first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, grads)
    second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, second, grads)
    by_first, by_second = 1 - 0.9**count, 1 - 0.999**count

    def moved(w: Any, m: Any, v: Any) -> Any:
        return w * (1 - lr * decay) - lr * (m / by_first) / (jnp.sqrt(v / by_second) + 1e-8)

    return (jax.tree.map(moved, weights, first, second), first, second, count), loss


def _loss(weights: Any, batch: Any) -> Any:
    h = jnp.concatenate([batch["a"], batch["p"]], axis=1)
    for number, (w, b) in enumerate(weights):
        h = h @ w + b
        h = jax.nn.gelu(h, approximate=False) if number < len(weights) - 1 else h
    x, y, radius2, p = h[:, :1], h[:, 1:], (h**2).sum(1, keepdims=True), batch["p"]
    wrong = [jax.nn.relu(y - x), jax.nn.relu((p / 2) ** 2 - radius2), jax.nn.relu(radius2 - p**2)]
    f = (1 - x) ** 2 + batch["a"] * (y - x**2) ** 2
    return f.mean() + 100.0 * sum(term.mean() for term in wrong)
