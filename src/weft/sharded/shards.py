"""A problem in shards: each process holds a part of the parameters, of their gradients and of the optimizer's state.

Torch shards and gathers (`fully_shard`, tensor parallelism: what the strategy's `parallelize_fn` did) and sums the
gradients of shards in backward. What weft adds makes that the same training as in one process: uneven shares of a batch
weigh as many rows as they have, parameters that are whole in each process are summed too, norms and checks are those
of all shards, and after a fit the module is whole again.

The sum in backward is a mean over processes, whatever their shares. So each loss is multiplied by its number of rows
before backward, and the gradients by (processes / rows of all) after: the same numbers as in one process, and no
message more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from weft.devices.group import Group
from weft.devices.processes import limit_entries, own_part, shrinking
from weft.step.optimizers import needs_closure, parameters_of

if TYPE_CHECKING:
    from weft.step.state import RunState

WHAT = "A problem in shards (strategy 'fsdp' or a ModelParallelStrategy)"


def processes_in_shards(state: RunState, interrupted: Callable[[], bool]) -> Shards:
    """The processes of a run that holds its problem in shards. Raises for options that cannot go with that."""
    _check(state)
    shards = Shards(state.fabric, interrupted)
    # Torch shards a module once in its life, so what shows its faces stays with it.
    found = vars(state.problem).get("_weft_faces") or Faces(state.fabric.strategy.setup_module, shards.device)
    shards.faces = vars(state.problem)["_weft_faces"] = found
    return shards


def _check(state: RunState) -> None:
    config, checkpointing = state.config, state.config.checkpointing
    wrong = {
        f"compile={config.compile!r}": (bool(config.compile), "use compile=False"),
        "checkpoints in the background": (
            checkpointing is not None and checkpointing.background,
            "use background=False",
        ),
        "Phase(freeze=...)": (
            any(p.freeze for p in state.training.phases),
            "set requires_grad of the problem before the fit",
        ),
    }
    for name, (found, instead) in wrong.items():
        if found:
            raise ValueError(f"{WHAT} cannot be combined with {name}; {instead}.")


class Shards(Group):
    """The processes of a run, each of which holds a part of the problem."""

    in_shards = True
    faces: Faces

    def __init__(self, fabric: Any, interrupted: Callable[[], bool]) -> None:
        super().__init__(fabric, interrupted)
        self.skips_empty = False  # to gather shards all must compute
        mesh = fabric.strategy.device_mesh
        self.data_rank, self.data_world = mesh["data_parallel"].get_local_rank(), mesh["data_parallel"].size()
        self.repeats = mesh["tensor_parallel"].get_local_rank() > 0  # tensor-parallel processes share their rows

    @contextmanager
    def holding(self, problem: nn.Module) -> Iterator[None]:
        """`problem` in shards; at the end it is whole again, in every process, on the CPU.

        After an error, when nobody knows who is still there, it stays in shards.
        """
        self.faces.show_shards(problem)
        self._refuse_odd(problem)
        self._buffers = {name: buffer.clone() for name, buffer in problem.named_buffers() if buffer.is_floating_point()}
        try:
            yield
        except BaseException:
            self.together = False
            raise
        finally:
            if self.together:
                self.faces.show_whole(problem)

    def _refuse_odd(self, problem: nn.Module) -> None:
        found = {name: p for name, p in problem.named_parameters() if hasattr(p, "to_local")}
        if not found:
            raise ValueError(f"parallelize_fn sharded no parameter of {type(problem).__name__}; use strategy='ddp'.")
        for name, p in found.items():
            mesh: Any = p.device_mesh  # type: ignore[attr-defined]
            if self.data_world > 1 and "data_parallel" not in (mesh.mesh_dim_names or ()):
                raise ValueError(
                    f"parallelize_fn left {name!r} unsharded over 'data_parallel', where {self.data_world} processes "
                    "compute "
                    "other rows, so nobody would sum its gradients. Call fully_shard(module, "
                    "mesh=mesh['data_parallel'])."
                )

    @contextmanager
    def gathered(self, problem: nn.Module) -> Iterator[None]:
        """The problem's own parameters gathered, those of its blocks when they are called.

        At the end in shards again.
        """
        if hasattr(problem, "unshard"):
            problem.unshard()  # type: ignore[operator]
        try:
            yield
        finally:
            reshard(problem)

    def arrange(self, optimizers: Mapping[str, Optimizer]) -> None:
        """One group of parameters for shards and one for whole ones: torch's fused loops cannot mix them.

        Raises ValueError for several optimizers, those that need a closure, and one of other parameters.
        """
        if len(optimizers) > 1 or any(map(needs_closure, optimizers.values())):
            kinds = [type(o).__name__ for o in optimizers.values()]
            raise ValueError(
                f"{WHAT} needs one optimizer that takes no closure, not {kinds}; use Adam, or strategy='ddp'."
            )
        known = {id(p) for p in self.faces.parameters()}
        for optimizer in optimizers.values():
            if any(id(p) not in known for p in parameters_of(optimizer)):
                raise ValueError(
                    f"{type(optimizer).__name__} has parameters that the problem in shards has not: it was made "
                    "before they "
                    "were sharded. Pass a function of the parameters, like lambda params: Adam(params)."
                )
            groups = list(optimizer.param_groups)
            optimizer.param_groups.clear()
            for group in groups:
                alike: dict[Any, list[Tensor]] = {}
                for p in group["params"]:
                    alike.setdefault(getattr(p, "device_mesh", None), []).append(p)
                optimizer.param_groups.extend({**group, "params": params} for params in alike.values())

    def whole(self, weights: dict[str, Any]) -> dict[str, Any]:
        """A state dict of shards, gathered on the CPU; every process must call. After an error there is none: {}."""
        return {name: _whole(value) for name, value in weights.items()} if self.together else {}

    # ---- gradients

    def combiner(
        self, params: Sequence[nn.Parameter], shards: Sequence[nn.Parameter] = ()
    ) -> Callable[[Tensor, int], Tensor] | None:
        """As of processes that hold everything; but loss and gradients come multiplied by this process's rows."""
        shards = [p for p in params if hasattr(p, "to_local")]
        combine_whole = super().combiner([p for p in params if not hasattr(p, "to_local")], shards)
        assert combine_whole is not None

        def combine(loss: Tensor, examples: int) -> Tensor:
            loss = combine_whole(loss, examples)
            share = self.world / self.num_rows.double()
            for p in cast(list[Any], shards):
                if p.grad is not None and p.grad.placements != p.placements:  # tensor parallelism may leave a sum to do
                    p.grad = p.grad.redistribute(placements=p.placements)
                if p.grad is not None:
                    own_part(p.grad).mul_(share)
            return loss

        return combine

    def leave(self, error: BaseException | None) -> None:
        """As of processes that hold everything; an error that shards are known to cause is explained."""
        super().leave(error)
        if isinstance(error, RuntimeError) and "storage of size 0" in str(error):
            error.add_note(
                "A block's weights are gone when what it computed is differentiated from outside "
                "(torch.autograd.grad in the "
                "loss). Shard the problem as a whole: fully_shard(problem, mesh=mesh['data_parallel'])."
            )

    @torch.no_grad()
    def norm(self, params: Sequence[Tensor]) -> Tensor:
        """The 2-norm of all gradients, over all shards."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for p in params:  # a shard that several processes hold counts once
            if p.grad is not None:
                grad = own_part(p.grad).flatten()
                part = torch.linalg.vector_norm(grad, dtype=torch.promote_types(grad.dtype, torch.float32))
                total += part.double().square() / self._holders(p)
        with self._contact():
            dist.all_reduce(total)
        return total.sqrt()

    @torch.no_grad()
    def clip(self, params: Sequence[Tensor], limit: float, by_value: bool = False) -> Tensor | None:
        """Clip the gradients by value, or by their norm over all shards, which is returned."""
        grads = [own_part(p.grad) for p in params if p.grad is not None]
        if by_value:
            for grad in grads:
                limit_entries(grad, limit)
            return None
        norm = self.norm(params)
        factor = shrinking(norm, limit)
        for grad in grads:
            grad.mul_(factor.to(grad.dtype))
        return norm

    def _holders(self, parameter: Any) -> float:
        if not hasattr(parameter, "to_local"):
            return self.world
        mesh = parameter.device_mesh
        pieces = [mesh.size(i) for i, placement in enumerate(parameter.placements) if hasattr(placement, "dim")]
        return self.world / torch.tensor(pieces or [1]).prod().item()

    def all_of(self, is_so: bool) -> bool:
        """Whether something is so in every process; all must call. Waits for the device."""
        agreed = torch.tensor(float(is_so), device=self.device)
        with self._contact():
            dist.all_reduce(agreed, dist.ReduceOp.MIN)
        return agreed.item() > 0

    @property
    def meshes(self) -> dict[tuple[str, ...], Any]:
        """The meshes of the problem's shards, by the names of their dimensions."""
        meshes = [p.device_mesh for p in self.faces.parameters() if hasattr(p, "to_local")]
        return {tuple(mesh.mesh_dim_names or ()): mesh for mesh in meshes}


def reshard(problem: nn.Module) -> None:
    """Give up what the blocks of `problem` gathered to compute with."""
    for module in problem.modules():
        if hasattr(module, "reshard"):
            module.reshard()  # type: ignore[operator]


def _whole(value: Any) -> Any:
    return value.full_tensor().cpu() if hasattr(value, "full_tensor") else value


# ---- one module, whole or in shards ----------------------------------------------------------------------------------

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
Face = tuple[type, dict[str, dict[Any, Any]], dict[str, Any]]
"""A module's class, its parameters, submodules and hooks, and the attributes that only this face has."""


class Faces:
    """A module that shows one of two faces: in shards while it is used, whole when a fit or an evaluation is over.

    `parallelize` shards the module in place; it is called once. The same shards are shown again in the next fit, with
    the values that the whole parameters then have, so an optimizer goes on.
    """

    def __init__(self, parallelize: Callable[[nn.Module], nn.Module], device: torch.device) -> None:
        self._parallelize, self._device = parallelize, device
        self._whole: dict[nn.Module, Face] = {}
        self._shards: dict[nn.Module, Face] = {}
        self._values: list[tuple[Any, nn.Parameter]] = []  # shards, whole
        self._in_shards = False

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copy of the module, made while it is whole, was never sharded

    def parameters(self) -> list[Any]:
        """The module's parameters, as it shows them now."""
        return [p for module in self._whole for p in module._parameters.values() if p is not None]

    @torch.no_grad()
    def show_shards(self, problem: nn.Module) -> None:
        """Show the module in shards, with the values that its whole parameters have."""
        if self._in_shards:
            return
        if not self._whole:
            names = {module: set(vars(module)) for module in problem.modules()}
            self._whole = {module: _face(module, set()) for module in problem.modules()}
            made = self._parallelize(problem)
            if made is not problem:
                raise TypeError(
                    "parallelize_fn returned another module; shard the one that it is given in place, and return it."
                )
            self._own = {module: set(vars(module)) - names[module] for module in self._whole}
        else:
            for module, face in self._shards.items():
                _show(module, face, set())
            for shard, whole in self._values:
                _distribute(whole, shard)
        problem.to(self._device)
        self._in_shards = True

    @torch.no_grad()
    def show_whole(self, problem: nn.Module) -> None:
        """Show the module whole, on the CPU, with the values that the shards have. Every process must call."""
        reshard(problem)
        self._shards = {module: _face(module, self._own[module]) for module in self._whole}
        made: dict[int, nn.Parameter] = {}
        for module, (kind, parts, only) in self._whole.items():
            now = self._shards[module][1]["_parameters"]
            for p in now.values():
                if hasattr(p, "to_local") and id(p) not in made:
                    made[id(p)] = nn.Parameter(p.full_tensor().cpu(), requires_grad=p.requires_grad)
            parts["_parameters"] = {name: made.get(id(p), p) for name, p in now.items()}
            _show(module, (kind, parts, only), self._own[module])
        shards = {id(p): p for _, parts, _ in self._shards.values() for p in parts["_parameters"].values()}
        self._values = [(shards[number], whole) for number, whole in made.items()]
        problem.to("cpu")
        self._in_shards = False


def _face(module: nn.Module, own: set[str]) -> Face:
    found = {name: dict(vars(module)[name]) for name in ("_parameters", "_modules", *_HOOKS) if name in vars(module)}
    return type(module), found, {name: vars(module)[name] for name in own}


def _show(module: nn.Module, face: Face, leave_out: set[str]) -> None:
    kind, found, own = face
    module.__class__ = kind
    for name, entries in found.items():  # in place: handles of hooks refer to these dicts
        vars(module)[name].clear()
        vars(module)[name].update(entries)
    for name in leave_out:
        vars(module).pop(name, None)
    vars(module).update(own)


def _distribute(whole: Tensor, shard: Any) -> None:
    """Copy this process's part of `whole` into `shard`."""
    from torch.distributed.tensor import distribute_tensor

    value = whole.detach().to(shard.device, shard.dtype)
    parts = distribute_tensor(value, shard.device_mesh, shard.placements, src_data_rank=None)
    shard.to_local().copy_(parts.to_local())
