"""The processes of a run, and what they tell each other. In a single process all of it is free.

Every process computes the gradients of its own rows; one flat sum over all of them, right before clipping, makes these
the gradients of the whole batch. No wrapper stands around the problem: parameters that a step does not use, several
optimizers, closures and loops of the user's own need nothing special.

    combine = processes.combiner(params)
    loss = combine(loss, examples)        # p.grad and loss are those of the global batch, alike to the last bit
    everywhere
"""

from __future__ import annotations

import copyreg
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from io import BytesIO
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from weft.devices.signals import Interruption

T = TypeVar("T")
LISTEN_EVERY = 16  # updates between two looks, on a GPU, at whether a process wants something: a look waits for the GPU


class LostProcessError(RuntimeError):
    """Another process of the job ended, or did not come to the same point in time."""


class Processes:
    """The processes of a run, seen from one of them.

    `rank` of `world`. `together` is False once this process is on its own way (an exception): it then asks nobody.

    What one process alone comes to (a signal, the end of its time, a call of `stop`) goes along with the next update as
    one number; where that is not zero, all of them ask each other at the end of the step, and act together.
    """

    in_shards = False
    """Whether each process holds only a part of the problem (`weft.sharded.shards`)."""

    def __init__(self, fabric: Fabric | None = None, interrupted: Callable[[], bool] = bool) -> None:
        self.rank = fabric.global_rank if fabric is not None else 0
        self.world = fabric.world_size if fabric is not None else 1
        self.data_rank, self.data_world = self.rank, self.world  # which rows of a global batch are this process's
        self.device = fabric.device if fabric is not None else torch.device("cpu")
        self.skips_empty = self.world > 1  # a process without a row of a short batch does nothing
        self.repeats = False  # another process computes the same rows, and tells of them
        self.together = True
        self.wishes: dict[str, Any] = {}
        """What this process wants, by name; `agree` grants it to all."""
        self.granted: dict[str, Any] = {}
        self._interrupted = interrupted
        self._called, self._num_combined = False, 0
        self._buffers: dict[str, Tensor] = {}
        self.num_rows = torch.ones(())  # of the last update, in all processes; on the device

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in order of rank. Every process must call."""
        if self.world == 1 or not self.together:
            return [value]
        told: list[Any] = [None] * self.world
        with self._contact():
            dist.all_gather_object(told, dumps(value))
        return [pickle.loads(data) for data in told]

    def first(self, make: Callable[[], T]) -> T:
        """What `make()` returns in the first process, in every one; if it raises there, it is raised in all."""
        if self.world == 1:
            return make()
        if not self.together:
            if self.rank:
                raise LostProcessError(f"Process {self.rank} of {self.world} is on its own (it raised an error).")
            return make()
        told: list[Any] = [None]
        if self.rank == 0:
            try:
                told = [dumps((make(), None))]
            except Exception as error:  # noqa: BLE001, raised below, in every process
                told = [dumps((None, error))]
        with self._contact():
            dist.broadcast_object_list(told, src=0)
        value, error = pickle.loads(told[0])
        if error is not None:
            raise error
        return value

    def leave(self, error: BaseException | None) -> None:
        """The end of a run: with an `error` this process is on its own way."""
        self.together = error is None

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over all processes. Every process must call."""
        if self.world == 1 or not self.together:
            return value
        total = value.detach().clone()
        with self._contact():
            dist.all_reduce(_real(total))
        return total / self.world

    # ---- weights

    @torch.no_grad()
    def share_weights(self, problem: nn.Module) -> None:
        """Give every process the first one's parameters and buffers. Raises ValueError if they built different problems."""
        if self.world == 1:
            return
        tensors = {**dict(problem.named_parameters()), **dict(problem.named_buffers())}
        shapes = {name: (tuple(t.shape), str(t.dtype)) for name, t in tensors.items()}
        for rank, other in enumerate(self.gather(shapes)):
            if other != shapes:
                differs = sorted(name for name in {*other, *shapes} if other.get(name) != shapes.get(name))
                raise ValueError(
                    f"Processes {self.rank} and {rank} have different problems: {differs[0]!r} is "
                    f"{shapes.get(differs[0])} here and {other.get(differs[0])} there. Build it alike in each."
                )
        for tensor in tensors.values():
            if tensor.layout is torch.strided and tensor.device.type != "meta":
                value = tensor.detach().contiguous().to(self.device)  # a problem in shards is whole on the CPU before
                with self._contact():
                    dist.broadcast(_real(value), src=0)
                if value.data_ptr() != tensor.data_ptr():
                    tensor.copy_(value)
        self._buffers = {name: buffer.clone() for name, buffer in _float_buffers(problem)}

    @torch.no_grad()
    def average_buffers(self, problem: nn.Module) -> None:
        """Make buffers that training changes (running means) those of the whole batch: their mean over the processes.

        Means of running means are the running means of the means, so once before they are used is enough. Left out are
        the buffers that a module names in `of_each_process`.
        """
        if self.world == 1:
            return
        now = dict(_float_buffers(problem))
        own = {
            f"{p}.{name}".lstrip(".") for p, m in problem.named_modules() for name in getattr(m, "of_each_process", ())
        }
        changed = {n: tuple(b.shape) for n, b in now.items() if n not in own and not _equal(b, self._buffers.get(n))}
        told = self.gather(changed)
        names = sorted(set().union(*told))
        if uneven := [n for n in names if len({t.get(n, tuple(now[n].shape)) for t in told}) > 1]:
            raise RuntimeError(f"Buffer {uneven[0]!r} has another size in each process; it cannot be averaged.")
        for name in names:
            value = now[name].detach().contiguous()
            with self._contact():
                dist.all_reduce(_real(value))
            now[name].copy_(value / self.world)
            self._buffers[name] = now[name].clone()

    def own_buffers(self, problem: nn.Module) -> dict[str, Tensor]:
        """Copies of the buffers that this process changed since they were last alike in all of them."""
        if self.world == 1:
            return {}
        now = _float_buffers(problem)
        return {name: buffer.clone() for name, buffer in now if not _equal(buffer, self._buffers.get(name))}

    @torch.no_grad()
    def set_own_buffers(self, problem: nn.Module, own: dict[str, Tensor]) -> None:
        """Put back what `own_buffers` gave."""
        now = dict(_float_buffers(problem))
        for name, value in own.items():
            now[name].copy_(value)
        self._buffers = {name: buffer.clone() for name, buffer in now.items() if name not in own}

    # ---- what is different where the problem is in shards

    def holding(self, problem: nn.Module) -> AbstractContextManager[Any]:
        """While `problem` is used: where it is in shards it comes whole out of this."""
        return nullcontext()

    def gathered(self, problem: nn.Module) -> AbstractContextManager[Any]:
        """While parts of `problem` are called one by one."""
        return nullcontext()

    def arrange(self, optimizers: Mapping[str, Optimizer]) -> None:
        """Make new optimizers fit for parameters in shards."""

    def whole(self, weights: dict[str, Any]) -> dict[str, Any]:
        """A state dict without shards."""
        return weights

    def norm(self, params: Sequence[Tensor]) -> Tensor:
        """The 2-norm of all gradients. Every process must call."""
        return nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])

    def clip(self, params: Sequence[Tensor], limit: float, by_value: bool) -> Tensor | None:
        """Clip gradients in shards, and return their norm if it is known."""
        raise NotImplementedError  # whole ones are clipped by torch

    def all_of(self, is_so: bool) -> bool:
        """Whether something is so in every process, where each sees other numbers."""
        return is_so

    # ---- gradients

    def combiner(
        self, params: Sequence[nn.Parameter], shards: Sequence[nn.Parameter] = ()
    ) -> Callable[[Tensor, int], Tensor] | None:
        """A function (loss, examples) -> the loss of the global batch, which makes the gradients of `params` those of
        it.

        `loss` is the mean over this process's `examples` rows, as its gradients are; with 0 rows both are left out.
        A parameter that no process used keeps the gradient None. None in a single process. `shards`: further
        parameters, whose gradients are left alone.
        """
        if self.world == 1:
            return None
        widest = (
            torch.float64
            if any(p.dtype in (torch.float64, torch.complex128) for p in (*params, *shards))
            else torch.float32
        )

        def combine(loss: Tensor, examples: int) -> Tensor:
            trained = [p for p in params if p.requires_grad]
            used = [p.grad is not None and examples > 0 for p in trained]
            values = [
                _real(p.grad).reshape(-1).to(widest) if u else _real(p).new_zeros(_real(p).numel(), dtype=widest)
                for p, u in zip(trained, used, strict=True)
            ]
            loss = loss.detach() if examples else torch.zeros_like(loss)  # the mean over no rows is nan
            values.append(loss.reshape(1).to(self.device, widest))
            flags = torch.tensor([*used, bool(self.wishes) or self._interrupted(), examples], dtype=widest)
            flat = torch.cat([*values, flags.to(self.device, non_blocking=True)])
            if not self.in_shards:  # else the loss was multiplied before backward
                flat[: -len(flags)] *= examples
            with self._contact():
                dist.all_reduce(flat)
            self.num_rows = flat[-1]
            means = flat[: -len(flags)].div_(flat[-1])
            anywhere = self._read(flat[-len(flags) : -1], used)
            sizes = [v.numel() for v in values]
            for p, u, mean in zip(trained, anywhere, means[:-1].split(sizes[:-1]), strict=True):
                p.grad = _like(mean, p) if u else None
            return means[-1].to(loss.dtype)

        return combine

    def _read(self, flags: Tensor, used: list[bool]) -> list[bool]:
        """Which parameters any process used. Also listens whether one wants something. Waits for a GPU only if it must."""
        self._num_combined += 1
        listens = flags.device.type == "cpu" or self._num_combined % LISTEN_EVERY == 0
        if not listens and all(used):
            return used
        *anywhere, wanting = flags.tolist()
        if listens:
            self._called = self._called or wanting > 0
        return [count > 0 for count in anywhere]

    def called(self) -> bool:
        """Whether a process wanted something at the last update; alike in all of them. Asking clears it."""
        was, self._called = self._called, False
        return was

    def agree(self, interruption: Interruption) -> bool:
        """Grant to all processes what any of them wants, the first one's wishes first. Every process must call."""
        told = self.gather((interruption.asked, self.wishes))
        interruption.asked = max(asked for asked, _ in told)
        for _, wishes in reversed(told):
            self.granted |= wishes
        self.wishes = {}
        return True

    def due(self, name: str, is_due: bool) -> bool:
        """Whether what is due by a clock is done now: at once in a single process, else when all know of it."""
        if self.world == 1:
            return is_due
        if is_due and name not in self.granted:
            self.wishes[name] = True
        return self.granted.pop(name, False)

    @contextmanager
    def _contact(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise LostProcessError(
                f"Process {self.rank} of {self.world} lost contact with another one, which ended or did not come to the "
                "same point in time (see `timeout`). If it raised an error, that one is the cause."
            ) from error


def dumps(value: Any, pickler: Callable[[Any], Any] = pickle.Pickler) -> bytes:
    """`value` pickled, tensors of unsigned integers (numpy's random state is one) too: torch 2.13 cannot read its own."""
    stream = BytesIO()
    writer = pickler(stream)
    writer.dispatch_table = {**getattr(writer, "dispatch_table", copyreg.dispatch_table), Tensor: _reduced}
    writer.dump(value)
    return stream.getvalue()


def _reduced(tensor: Tensor) -> Any:
    if tensor.dtype in (torch.uint16, torch.uint32, torch.uint64):
        return _viewed, (tensor.contiguous().view(torch.uint8), tensor.dtype)
    return tensor.__reduce_ex__(4)


def _viewed(data: Tensor, dtype: torch.dtype) -> Tensor:
    return data.view(dtype)


def own_part(tensor: Any) -> Tensor:
    """The part of a sharded tensor that this process holds, sharing its memory; any other tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _real(tensor: Any) -> Tensor:
    if tensor.layout is not torch.strided:
        raise TypeError("Several processes cannot share sparse gradients; make the layer with sparse=False.")
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _like(mean: Tensor, parameter: nn.Parameter) -> Tensor:
    if parameter.is_complex():
        return torch.view_as_complex(mean.view(*parameter.shape, 2)).to(parameter.dtype)
    return mean.view(parameter.shape).to(parameter.dtype)


def _float_buffers(problem: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, buffer in problem.named_buffers():
        if buffer.layout is torch.strided and (buffer.is_floating_point() or buffer.is_complex()):
            yield name, buffer


def _equal(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
