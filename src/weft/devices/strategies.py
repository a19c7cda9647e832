"""Strategies that keep a part of the problem in each process, for problems that outgrow one GPU.

`strategy="fsdp"` and Fabric's `FSDPStrategy` become a `ModelParallelStrategy` whose `parallelize_fn` is `shard_blocks`:
one way to shard, that of torch's `fully_shard`, on a GPU and on a CPU. A `ModelParallelStrategy` of your own is taken
as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

SMALLEST_BLOCK = 1_000_000  # parameters: gathering fewer at a time saves no memory worth its messages
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)  # have no forward
_OPTIONS = ("cpu_offload", "mixed_precision", "_state_dict_type")  # of FSDPStrategy, beside what it hands on to torch


def sharding_strategy(asked: Any) -> Any:
    """The `ModelParallelStrategy` that `asked` ("fsdp", an `FSDPStrategy`) stands for; anything else as it is.

    Raises ValueError naming the options of an `FSDPStrategy` that have no counterpart here.
    """
    from lightning.fabric.strategies.fsdp import FSDPStrategy
    from lightning.fabric.strategies.model_parallel import ModelParallelStrategy

    if asked != "fsdp" and not isinstance(asked, FSDPStrategy):
        return asked

    class FullyShardedStrategy(ModelParallelStrategy):
        """All processes share the parameters; none splits a layer."""

        def setup_environment(self) -> None:
            self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
            super().setup_environment()

    keep_gathered = isinstance(asked, FSDPStrategy) and _keeps_gathered(asked)
    strategy = FullyShardedStrategy(lambda problem, mesh: shard_blocks(problem, mesh, keep_gathered))
    if isinstance(asked, FSDPStrategy):
        strategy._timeout, strategy._process_group_backend = asked._timeout, asked._process_group_backend
    return strategy


def _keeps_gathered(strategy: Any) -> bool:
    """Whether weights stay gathered between forward and backward. ValueError for options that would have no effect."""
    from lightning.fabric.strategies.fsdp import FSDPStrategy

    plain, found = vars(FSDPStrategy()), vars(strategy)
    changed = sorted(
        {**strategy._fsdp_kwargs, **strategy._activation_checkpointing_kwargs}.keys() - {"use_orig_params"}
    )
    changed += [name.strip("_") for name in _OPTIONS if repr(found[name]) != repr(plain[name])]
    kind = strategy.sharding_strategy.name
    if kind not in ("FULL_SHARD", "SHARD_GRAD_OP"):
        changed.append("sharding_strategy")
    if changed:
        raise ValueError(
            f"FSDPStrategy: {', '.join(changed)} cannot be used here, where torch's fully_shard keeps the shards; of "
            "its "
            "options only sharding_strategy='FULL_SHARD' or 'SHARD_GRAD_OP' can. Shard the modules yourself: "
            "ModelParallelStrategy(parallelize_fn, data_parallel_size, tensor_parallel_size)."
        )
    return kind == "SHARD_GRAD_OP"


def shard_blocks(problem: nn.Module, mesh: DeviceMesh, keep_gathered: bool = False) -> nn.Module:
    """The problem, with the parameters of its blocks sharded over the processes of the mesh's "data_parallel".

    A block's parameters are gathered while it computes. Blocks are the parts of the problem (its nodes) and, inside
    them, modules of at least `SMALLEST_BLOCK` parameters. Parameters of the problem itself, and single numbers, stay
    whole. A problem that differentiates what its nodes compute (`grad_inference`, as PINNs have it) is one block.
    """
    from torch.distributed.fsdp import fully_shard

    blocks = [block for part in _parts_of(problem) for block in _blocks(part, is_part=True)]
    if any(
        getattr(module, "grad_inference", False) for module in problem.modules()
    ):  # a block's weights are gone when it is differentiated from outside
        blocks = [problem] if blocks else []
    if not blocks:
        raise ValueError(
            f"{type(problem).__name__} has no submodule with parameters, so there is nothing to shard; "
            "use strategy='ddp', or put its parameters into a module of their own."
        )
    scalars = {p for p in problem.parameters() if p.dim() == 0}  # torch 2.13 cannot shard these; they stay whole
    for block in blocks:
        fully_shard(block, mesh=mesh["data_parallel"], reshard_after_forward=not keep_gathered, ignored_params=scalars)
    return problem


def _parts_of(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, _CONTAINERS):
            yield from _parts_of(child)
        else:
            yield child


def _blocks(module: nn.Module, is_part: bool = False) -> list[nn.Module]:
    """The blocks in `module`, inner ones first, as `fully_shard` wants them."""
    # Attention reads the weights of its output layer without calling it.
    inner = (
        [] if isinstance(module, nn.MultiheadAttention) else [b for child in module.children() for b in _blocks(child)]
    )
    taken = {id(p) for block in inner for p in block.parameters()}
    own = sum(p.numel() for p in module.parameters() if id(p) not in taken)
    is_block = own > 0 if is_part else own >= SMALLEST_BLOCK and not isinstance(module, _CONTAINERS)
    return [*inner, module] if is_block else inner
