"""Several processes that train one problem.

Every process computes the gradients of its own rows; one flat sum over all of them, right before clipping, makes these
the gradients of the whole batch. No wrapper stands around the problem: parameters that a step does not use, several
optimizers, closures and loops of the user's own need nothing special.

    combine = processes.combiner(params)
    loss = combine(loss, examples)      # p.grad and loss are those of the global batch, to the last bit everywhere
"""

from __future__ import annotations

import copyreg
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from weft.devices.processes import Combine, Processes
from weft.devices.signals import Interruption

if TYPE_CHECKING:
    from lightning.fabric import Fabric

T = TypeVar("T")
LISTEN_EVERY = 16  # updates between two looks, on a GPU, at whether a process wants something: a look waits for the GPU


class LostProcessError(RuntimeError):
    """Another process of the job ended, or did not come to the same point in time."""


class Group(Processes):
    """The processes of a run, seen from one of them.

    What one process alone comes to (a signal, the end of its time, a call of `stop`) goes along with the next update as
    one number; where that is not zero, all of them ask each other at the end of the step, and act together.
    """

    def __init__(self, fabric: Fabric, interrupted: Callable[[], bool] = bool) -> None:
        super().__init__(fabric.device)
        self.rank, self.world = fabric.global_rank, fabric.world_size
        self.data_rank, self.data_world = self.rank, self.world
        self.skips_empty = True
        self.together = True
        """False once this process is on its own way (an exception): it then asks nobody."""
        self._interrupted = interrupted
        self._called, self._num_combined = False, 0
        self._buffers: dict[str, Tensor] = {}
        self._hangs: Any = None
        self.num_rows = torch.ones(())  # of the last update, in all processes; on the device

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in order of rank. Every process must call."""
        if not self.together:
            return [value]
        told: list[Any] = [None] * self.world
        with self._contact():
            dist.all_gather_object(told, dumps(value))
        return [pickle.loads(data) for data in told]

    def first(self, make: Callable[[], T]) -> T:
        """What `make()` returns in the first process, in every one; if it raises there, it is raised in all."""
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
        if not self.together:
            return value
        total = value.detach().clone()
        with self._contact():
            dist.all_reduce(_real(total))
        return total / self.world

    # ---- weights

    @torch.no_grad()
    def share_weights(self, problem: nn.Module) -> None:
        """Give every process the first one's parameters and buffers.

        Raises ValueError if they built different problems.
        """
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
        now = _float_buffers(problem)
        return {name: buffer.clone() for name, buffer in now if not _equal(buffer, self._buffers.get(name))}

    @torch.no_grad()
    def set_own_buffers(self, problem: nn.Module, own: dict[str, Tensor]) -> None:
        """Put back what `own_buffers` gave."""
        now = dict(_float_buffers(problem))
        for name, value in own.items():
            now[name].copy_(value)
        self._buffers = {name: buffer.clone() for name, buffer in now.items() if name not in own}

    # ---- gradients

    def combiner(self, params: Sequence[nn.Parameter], shards: Sequence[nn.Parameter] = ()) -> Combine | None:
        """A function (loss, examples) -> the loss of the global batch; it makes the gradients of `params` those of it.

        `loss` is the mean over this process's `examples` rows, as its gradients are; with 0 rows both are left out.
        A parameter that no process used keeps the gradient None. `shards`: further parameters, whose gradients are left
        alone.
        """
        wide = any(p.dtype in (torch.float64, torch.complex128) for p in (*params, *shards))
        widest = torch.float64 if wide else torch.float32

        def gradient(p: nn.Parameter, used: bool) -> Tensor:
            if used:
                return _real(p.grad).reshape(-1).to(widest)
            return _real(p).new_zeros(_real(p).numel(), dtype=widest)

        def combine(loss: Tensor, examples: float | Tensor) -> Tensor:
            on_device = isinstance(examples, Tensor)  # a step's denominator, which is not read
            trained = [p for p in params if p.requires_grad]
            used = [p.grad is not None and (on_device or bool(examples > 0)) for p in trained]
            loss = loss.detach() if on_device or examples else torch.zeros_like(loss)  # the mean over no rows is nan
            means = [*map(gradient, trained, used), loss.reshape(1).to(self.device, widest)]
            sizes = [mean.numel() for mean in means]
            told = [*used, bool(self.wishes) or self._interrupted(), 0.0 if on_device else examples]
            counts = torch.tensor(told, dtype=widest)
            flat = torch.cat([*means, counts.to(self.device, non_blocking=True)])
            if on_device:
                flat[-1] = examples
            if not self.in_shards:  # else the loss was multiplied before backward
                flat[: -len(counts)] *= examples
                if on_device:
                    flat = torch.where(flat[-1] > 0, flat, flat.nan_to_num(0.0, 0.0, 0.0))
            with self._contact():
                dist.all_reduce(flat)
            sums, heard, self.num_rows = flat[: -len(counts)], flat[-len(counts) : -1], flat[-1]
            *gradients, loss_of_all = sums.div_(self.num_rows).split(sizes)
            for p, anywhere, mean in zip(trained, self._used_anywhere(heard, used), gradients, strict=True):
                p.grad = _like(mean, p) if anywhere else None
            return loss_of_all[0].to(loss.dtype)

        return combine

    def _used_anywhere(self, heard: Tensor, used: list[bool]) -> list[bool]:
        """Which parameters any process used. Also hears whether one wants something.

        Waits for a GPU only if it must.
        """
        self._num_combined += 1
        listens = heard.device.type == "cpu" or self._num_combined % LISTEN_EVERY == 0
        if not listens and all(used):
            return used
        *users, wanting = heard.tolist()
        if listens:
            self._called = self._called or wanting > 0
        return [count > 0 for count in users]

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
        """Whether what is due by a clock is done now: when all know of it."""
        if is_due and name not in self.granted:
            self.wishes[name] = True
        return self.granted.pop(name, False)

    def watch(self, folder: Path, step: Callable[[], int], timeout: float | None) -> Callable[[], None]:
        """Have each process write down in `folder` where it is when it hangs; call what this returns at the end."""
        from weft.devices.hangs import HangWatch

        self._hangs = HangWatch(folder, self.rank, timeout or 1800.0, step)
        return self._hangs.close

    @contextmanager
    def _contact(self) -> Iterator[None]:
        if self._hangs is not None:
            self._hangs.mark(sys._getframe(2).f_code.co_name)
        try:
            yield
        except RuntimeError as error:
            raise LostProcessError(
                f"Process {self.rank} of {self.world} lost contact with another one, which ended or did not come to "
                "the same point in time (see `timeout`). If it raised an error, that one is the cause."
                f"{self._hangs.found() if self._hangs is not None else ''}"
            ) from error


def dumps(value: Any, pickler: Callable[[Any], Any] = pickle.Pickler) -> bytes:
    """`value` pickled, tensors of unsigned integers (numpy's random state is one) too.

    Torch 2.13 cannot read its own.
    """
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
