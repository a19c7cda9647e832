"""The same problems in JAX, an epoch as one `lax.scan`: the whole loop is XLA's. Needs the extra `jax`.

Each loss is a function of the layers of the workload's one network and of a batch; weights come from the torch problem.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from torch import Tensor, nn

from benchmarks.workloads import Workload

Layers = list[tuple[Any, Any]]
Batch = dict[str, Any]
exact_gelu = partial(jax.nn.gelu, approximate=False)


def network(layers: Layers, x: Any, nonlinear: Callable[[Any], Any] = exact_gelu) -> Any:
    for weight, bias in layers[:-1]:
        x = nonlinear(x @ weight.T + bias)
    weight, bias = layers[-1]
    return x @ weight.T + bias


def rosenbrock(layers: Layers, batch: Batch) -> Any:
    a, p = batch["a"], batch["p"]
    x = network(layers, jnp.concatenate([a, p], -1))
    x1, x2 = x[:, :1], x[:, 1:]
    radius2 = x1**2 + x2**2
    violated = (x2 - x1, (p / 2) ** 2 - radius2, radius2 - p**2)
    return jnp.mean((1 - x1) ** 2 + a * (x2 - x1**2) ** 2) + 100 * sum(jnp.mean(jax.nn.relu(v)) for v in violated)


def pinn(layers: Layers, batch: Batch) -> Any:
    """Derivatives in forward mode, which is quicker here than in reverse."""
    t, x = batch["t"], batch["x"]
    ones = jnp.ones_like(x)

    def u(t: Any, x: Any) -> Any:
        return network(layers, jnp.concatenate([t, x], -1), jnp.tanh)

    def u_x(x: Any) -> Any:
        return jax.jvp(partial(u, t), (x,), (ones,))[1]

    value, u_t = jax.jvp(lambda t: u(t, x), (t,), (ones,))
    first, second = jax.jvp(u_x, (x,), (ones,))
    return jnp.mean((u_t + value * first - 0.01 / jnp.pi * second) ** 2)


def neural_ode(layers: Layers, batch: Batch) -> Any:
    h, right = 0.1, partial(network, layers, nonlinear=jnp.tanh)

    def step(x: Any, _: None) -> tuple[Any, Any]:
        k1 = right(x)
        k2 = right(x + h / 2 * k1)
        k3 = right(x + h / 2 * k2)
        k4 = right(x + h * k3)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return x, x

    _, path = jax.lax.scan(step, batch["x"], length=10, unroll=True)
    return jnp.mean((jnp.swapaxes(path, 0, 1) - batch["y"]) ** 2)


def wide(layers: Layers, batch: Batch) -> Any:
    return jnp.mean((network(layers, batch["x"]) - jnp.sin(batch["x"])) ** 2)


LOSSES: dict[str, tuple[Callable[[Layers, Batch], Any], float]] = {
    "Rosenbrock (weft)": (rosenbrock, 1e-3),
    "PINN (Burgers)": (pinn, 1e-3),
    "neural ODE": (neural_ode, 1e-3),
    "wide MLP": (wide, 1e-4),
}
"""By workload: the loss, and AdamW's learning rate."""


def adamw(rate: float, clip: float, weights: Any, state: Any, grads: Any) -> tuple[Any, Any]:
    """torch's AdamW with its defaults, after its clipping by the norm."""
    step, first, second = state
    norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))
    grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, clip / (norm + 1e-6)), grads)
    step = step + 1
    first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, grads)
    second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, second, grads)
    size, root = rate / (1 - 0.9**step), jnp.sqrt(1 - 0.999**step)
    weights = jax.tree.map(
        lambda w, m, v: w * (1 - rate * 0.01) - size * m / (jnp.sqrt(v) / root + 1e-8), weights, first, second
    )
    return weights, (step, first, second)


@contextmanager
def on_cores(number: int) -> Iterator[None]:
    """Within, all threads of the process share this many cores: XLA's own cannot be told another number later."""
    tasks, allowed = Path("/proc/self/task"), os.sched_getaffinity(0)

    def put(cores: set[int]) -> None:
        for task in tasks.iterdir():
            os.sched_setaffinity(int(task.name), cores)

    put(set(sorted(allowed)[:number]))
    try:
        yield
    finally:
        put(allowed)


def train(workload: Workload, problem: nn.Module, tick: Callable[[], None]) -> float:
    """The dev loss after the last epoch; `tick` is called as each epoch begins, and at the end."""
    loss, rate = LOSSES[workload.name]
    with on_cores(workload.threads):
        return _train(workload, problem, tick, loss, partial(adamw, rate, workload.clip))


def _train(
    workload: Workload,
    problem: nn.Module,
    tick: Callable[[], None],
    loss: Callable[[Layers, Batch], Any],
    optimizer: Callable[..., tuple[Any, Any]],
) -> float:
    given = [jnp.asarray(p.detach().numpy()) for p in problem.parameters()]
    layers: Layers = list(zip(given[::2], given[1::2], strict=True))
    size, rows = workload.batch_size, len(next(iter(workload.train.values())))
    whole, left = divmod(rows, size)

    def put(tensors: dict[str, Tensor]) -> Batch:
        return {key: jnp.asarray(t.numpy()) for key, t in tensors.items()}

    train, dev = put(workload.train), put(workload.dev)
    batches = {key: t[: whole * size].reshape(whole, size, *t.shape[1:]) for key, t in train.items()}
    rest = {key: t[whole * size :] for key, t in train.items()}

    def update(carried: Any, batch: Batch) -> tuple[Any, Any]:
        layers, state = carried
        value, grads = jax.value_and_grad(loss)(layers, batch)
        return optimizer(layers, state, grads), value

    @jax.jit
    def epoch(carried: Any) -> tuple[Any, Any]:
        carried, values = jax.lax.scan(update, carried, batches)
        if left:
            carried, _ = update(carried, rest)
        return carried, (jnp.mean(values), loss(carried[0], dev))

    nothing = jax.tree.map(jnp.zeros_like, layers)
    carried, reported = (layers, (jnp.zeros(()), nothing, nothing)), (jnp.zeros(()), jnp.zeros(()))
    for _ in range(workload.epochs):
        tick()
        carried, reported = jax.block_until_ready(epoch(carried))
    tick()
    return float(reported[1])
