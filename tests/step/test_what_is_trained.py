"""What is trained is what the problem registers and what the optimizer holds; all else that a loss reaches is named.

The truth is a raw PyTorch loop over the same functions, bit for bit.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
import weft.loop.phases
import weft.step.trained

ROWS, BATCH, EPOCHS = 24, 4, 3
GLOBAL = nn.Parameter(torch.ones(1))
UNSEEN = "requires grad and is not trained"


def data(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    x = torch.linspace(0.1, 1.0, ROWS, dtype=torch.float32)[:, None]
    return {"x": x.to(dtype), "y": (3 * x).to(dtype)}


@dataclass
class Case:
    """Something to train, and the parameters that it reaches without registering them."""

    problem: nn.Module
    outside: list[Tensor] = field(default_factory=list)
    step: Callable[[Any, Any], Any] | None = None
    hooks: Any = None
    trainer: type[weft.Trainer] = weft.Trainer

    def loss(self, batch: dict[str, Any]) -> Tensor:
        batch = {**batch, "name": "train"}
        if self.hooks is not None:
            self.hooks["on_step_start"](None, batch)
        if self.step is not None:
            return self.step(Standing(self.problem), batch)
        return self.problem(batch)["train_loss"]


@dataclass
class Standing:
    """What a step asks of a trainer."""

    problem: nn.Module


def k() -> nn.Parameter:
    return nn.Parameter(torch.ones(1))


def square(u: Tensor, v: Tensor, y: Tensor) -> Tensor:
    return (u + v - y) ** 2


def nodes(fn: Callable[..., Any], objective: Callable[..., Any] = square) -> weft.Problem:
    """A net that is registered, and beside it a node made of `fn`."""
    torch.manual_seed(0)
    net = weft.Node(nn.Linear(1, 1), ["x"], ["v"], name="a")
    return weft.Problem([net, weft.Node(fn, ["x"], ["u"], name="b")], [weft.objective(objective, name="m")])


class Plain(nn.Module):
    """A module of the user's own, whose forward is `fn(self, x)`."""

    def __init__(self, fn: Callable[[Any, Tensor], Tensor], **held: Any) -> None:
        super().__init__()
        self.fn = fn
        for name, value in held.items():
            setattr(self, name, value)

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {f"{batch['name']}_loss": ((self.fn(self, batch["x"]) - batch["y"]) ** 2).mean()}


# ---- registered: trained, however they are reached


def attribute() -> Case:
    return Case(Plain(lambda s, x: s.k * x, k=k()))


def slice_of_a_parameter_list() -> Case:
    def forward(s: Any, x: Tensor) -> Tensor:
        for w, b in zip(s.ps[0::2], s.ps[1::2], strict=True):
            x = torch.tanh(x * w + b)
        return x

    return Case(Plain(forward, ps=nn.ParameterList([k(), k(), k(), k()])))


def kept_list() -> Case:
    torch.manual_seed(0)
    layer = nn.Linear(1, 1)
    return Case(Plain(lambda s, x: x @ s.kept[0].T + s.kept[1], layer=layer, kept=list(layer.parameters())))


def kept_dict() -> Case:
    torch.manual_seed(0)
    layer = nn.Linear(1, 1)
    return Case(
        Plain(lambda s, x: x @ s.kept["weight"].T + s.kept["bias"], layer=layer, kept=dict(layer.named_parameters()))
    )


def functional_call_of_its_own() -> Case:
    torch.manual_seed(0)
    layer = nn.Linear(1, 1)
    call = torch.func.functional_call
    return Case(Plain(lambda s, x: call(s.layer, dict(s.layer.named_parameters()), (x,)), layer=layer))


class Squared(nn.Module):
    """Positive weights."""

    def forward(self, w: Tensor) -> Tensor:
        return w**2


def parametrization() -> Case:
    torch.manual_seed(0)
    layer = nn.Linear(1, 1)
    nn.utils.parametrize.register_parametrization(layer, "weight", Squared())
    return Case(Plain(lambda s, x: s.layer(x), layer=layer))


def shared_weight() -> Case:
    torch.manual_seed(0)
    first, second = nn.Linear(1, 1), nn.Linear(1, 1)
    second.weight = first.weight
    return Case(Plain(lambda s, x: s.second(s.first(x)), first=first, second=second))


def bound_method_of_a_module() -> Case:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = k()

        def scaled(self, x: Tensor) -> Tensor:
            return self.w * x

    return Case(nodes(Two().scaled))


def closure_over_what_another_node_registers() -> Case:
    torch.manual_seed(0)
    net = nn.Linear(1, 1)
    objective = weft.objective(lambda v, w, y: (v + w - y) ** 2)
    pair = [weft.Node(lambda x: net(x) ** 2, ["x"], ["w"], name="b"), weft.Node(net, ["x"], ["v"], name="a")]
    return Case(weft.Problem(pair, [objective]))


REGISTERED = [
    attribute,
    slice_of_a_parameter_list,
    kept_list,
    kept_dict,
    functional_call_of_its_own,
    parametrization,
    shared_weight,
    bound_method_of_a_module,
    closure_over_what_another_node_registers,
]


# ---- reached by another way: by a node or term of a weft.Problem


def closure() -> Case:
    w = k()
    return Case(nodes(lambda x: w * x), [w])


def read_from_its_module(x: Tensor) -> Tensor:
    return GLOBAL * x


def module_of_the_user() -> Case:
    GLOBAL.data, GLOBAL.grad = torch.ones(1), None
    GLOBAL.requires_grad_(True)
    return Case(nodes(read_from_its_module), [GLOBAL])


def scaled(w: Tensor, x: Tensor) -> Tensor:
    return w * x


def keyword_of_a_partial() -> Case:
    w = k()
    return Case(nodes(partial(lambda x, w: w * x, w=w)), [w])


def argument_of_a_partial() -> Case:
    w = k()
    return Case(nodes(partial(scaled, w)), [w])


def default_argument() -> Case:
    w = k()
    return Case(nodes(lambda x, w=w: w * x), [w])


def default_of_a_keyword() -> Case:
    w = k()
    return Case(nodes(lambda x, *, w=w: w * x), [w])


class Holder:
    """A plain object."""

    def __init__(self, w: Tensor) -> None:
        self.w = w

    def scaled(self, x: Tensor) -> Tensor:
        return self.w * x

    def __call__(self, x: Tensor) -> Tensor:
        return self.scaled(x)


class Slotted:
    """An object without a dict."""

    __slots__ = ("w",)

    def __init__(self, w: Tensor) -> None:
        self.w = w


def bound_method_of_an_object() -> Case:
    w = k()
    return Case(nodes(Holder(w).scaled), [w])


def object_that_is_called() -> Case:
    w = k()
    return Case(nodes(Holder(w)), [w])


def attribute_of_an_object() -> Case:
    w = k()
    held = Holder(w)
    return Case(nodes(lambda x: held.w * x), [w])


def slot_of_an_object() -> Case:
    w = k()
    held = Slotted(w)
    return Case(nodes(lambda x: held.w * x), [w])


def attribute_of_a_class() -> Case:
    class Physics:
        w = k()

    return Case(nodes(lambda x: Physics.w * x), [Physics.w])


def list_in_a_closure() -> Case:
    ws = [k(), k()]
    return Case(nodes(lambda x: ws[0] * x + ws[1]), [*ws])


def tuple_in_a_closure() -> Case:
    ws = (k(), k())
    return Case(nodes(lambda x: ws[0] * x + ws[1]), [*ws])


def dict_in_a_closure() -> Case:
    ws = {"a": {"b": k()}}
    return Case(nodes(lambda x: ws["a"]["b"] * x), [ws["a"]["b"]])


def module_in_a_closure() -> Case:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, 1))
    return Case(nodes(lambda x: net(x)), list(net.parameters()))


def functional_call_of_others() -> Case:
    torch.manual_seed(1)
    shape = nn.Linear(1, 1, device="meta")
    weights = {"weight": nn.Parameter(torch.ones(1, 1)), "bias": nn.Parameter(torch.zeros(1))}
    return Case(nodes(lambda x: torch.func.functional_call(shape, weights, (x,))), list(weights.values()))


def function_that_is_called() -> Case:
    w = k()

    def inner(x: Tensor) -> Tensor:
        return w * x

    return Case(nodes(lambda x: inner(x)), [w])


def term() -> Case:
    w = k()
    return Case(nodes(lambda x: x, lambda u, v, y: (w * u + v - y) ** 2), [w])


def plain_tensor() -> Case:
    w = torch.ones(1, requires_grad=True)
    return Case(nodes(lambda x: w * x), [w])


def distribution() -> Case:
    w = k()
    normal = torch.distributions.Normal(w, 1.0)
    return Case(nodes(lambda x: normal.loc * x), [w])


BY_NODES = [
    closure,
    module_of_the_user,
    keyword_of_a_partial,
    argument_of_a_partial,
    default_argument,
    default_of_a_keyword,
    bound_method_of_an_object,
    object_that_is_called,
    attribute_of_an_object,
    slot_of_an_object,
    attribute_of_a_class,
    list_in_a_closure,
    tuple_in_a_closure,
    dict_in_a_closure,
    module_in_a_closure,
    functional_call_of_others,
    function_that_is_called,
    term,
    plain_tensor,
    distribution,
]


# ---- reached by another way: by code that runs as it is


def unregistered_list_of_a_module() -> Case:
    torch.manual_seed(0)
    layers = [nn.Linear(1, 1), nn.Linear(1, 1)]
    case = Plain(lambda s, x: s.layers[0](x) + s.net(x), net=layers[1], layers=layers[:1])
    return Case(case, list(layers[0].parameters()))


def step_of_a_trainer() -> Case:
    w = k()
    problem = nodes(lambda x: x)
    return Case(problem, [w], step=lambda t, batch: w.square().sum() + t.problem(batch)["train_loss"])


def hook() -> Case:
    w = k()

    def scale(trainer: Any, batch: dict[str, Any]) -> None:
        for one in batch if isinstance(batch, list) else [batch]:
            one["x"] = w * one["x"]

    return Case(nodes(lambda x: x), [w], hooks={"on_step_start": scale})


BY_CODE = [unregistered_list_of_a_module, step_of_a_trainer, hook]

CELLS: dict[str, dict[str, Any]] = {
    "eager": {},
    "accumulate": {"accumulate": 2},
    "64-true": {"precision": "64-true"},
    "resume": {},
}


# ---- the two loops


def by_hand(case: Case, cell: str, held: bool) -> list[Tensor]:
    """The weights that a raw PyTorch loop ends with."""
    dtype = torch.float64 if cell == "64-true" else torch.float32
    was = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    case.problem.to(dtype)
    for p in case.outside:
        p.data = p.data.to(dtype)
    params = [p for p in case.problem.parameters() if p.requires_grad] + (case.outside if held else [])
    optimizer = torch.optim.Adam(params, lr=0.05)
    size = CELLS[cell].get("accumulate", 1)
    rows = data(dtype)
    batches = [{key: v[i : i + BATCH] for key, v in rows.items()} for i in range(0, ROWS, BATCH)]
    for _ in range(EPOCHS):
        for first in range(0, len(batches), size):
            optimizer.zero_grad()
            for batch in batches[first : first + size]:
                (case.loss(dict(batch)) / size).backward()
            optimizer.step()
    torch.set_default_dtype(was)
    return weights(case)


def weights(case: Case) -> list[Tensor]:
    return [p.detach().clone() for p in (*case.problem.parameters(), *case.outside)]


def by_weft(make: Callable[[], Case], cell: str, held: bool, folder: Path) -> list[Tensor]:
    """The weights that weft ends with; in the cell "resume" after it died in the middle and began again."""

    def fit(case: Case, **options: Any) -> list[Tensor]:
        last: list[list[Tensor]] = []  # of the last epoch, as the best may be those of an earlier one
        outside = case.outside if held else []
        hooks = [case.hooks] if case.hooks is not None else []
        hooks += [{"on_epoch_end": lambda *args: last.append(weights(case))}]
        trainer = case.trainer(
            epochs=EPOCHS,
            progress=False,
            optimizer=lambda q: torch.optim.Adam([*q, *outside], lr=0.05),
            training_step=case.step,
            hooks=hooks + options.pop("more", []),
            **CELLS[cell],
            **options,
        )
        trainer.fit(case.problem, weft.Data(data(), batch_size=BATCH, shuffle=False))
        return last[-1]

    case = make()
    if cell != "resume":
        return fit(case)
    left = iter([7, math.inf])
    kept = {"checkpoint": {"every_n_steps": 2}, "root_dir": str(folder), "run_name": "r"}
    with pytest.raises(InterruptedError):
        fit(case, **kept, more=[Dies(next(left))])
    case = make()
    return fit(case, **kept, more=[Dies(next(left))], resume="auto")


class Dies(weft.Hook):
    """Ends the run with an error after so many steps."""

    def __init__(self, at: float) -> None:
        self.at = at

    def on_step_end(self, trainer: Any, batch: Any, loss: Tensor) -> None:
        if trainer.global_step == self.at:
            raise InterruptedError


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(x.dtype is y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def name_of(make: Callable[[], Case]) -> str:
    return make.__name__


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("make", [*REGISTERED, *BY_NODES, *BY_CODE], ids=name_of)
def test_what_is_registered_or_held_by_the_optimizer_trains_as_by_hand(
    make: Callable[[], Case], cell: str, tmp_path: Path
) -> None:
    start = weights(make())
    ours = by_weft(make, cell, held=True, folder=tmp_path)
    theirs = by_hand(make(), cell, held=True)
    assert same(ours, theirs)
    assert not any(a.dtype is b.dtype and torch.equal(a, b) for a, b in zip(start, theirs, strict=True))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("make", BY_NODES, ids=name_of)
def test_what_a_node_or_term_reaches_besides_is_named_before_the_first_update(
    make: Callable[[], Case], cell: str, tmp_path: Path
) -> None:
    steps: list[Any] = []
    case = make()
    before = weights(case)
    trainer = weft.Trainer(
        epochs=2, progress=False, hooks=[{"on_before_optimizer_step": lambda *a: steps.append(a)}], **CELLS[cell]
    )
    owner = "objective 'm'" if make is term else "node 'b'"
    with pytest.raises(ValueError, match=rf"{owner} uses .*of shape \(.*{UNSEEN}.*requires_grad_\(False\)"):
        trainer.fit(case.problem, weft.Data(data(), batch_size=BATCH))
    assert not steps
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(weights(case), before, strict=True))
    for p in case.outside:
        p.requires_grad_(False)
    weft.Trainer(epochs=1, progress=False, **CELLS[cell]).fit(case.problem, weft.Data(data(), batch_size=BATCH))
    assert same(weights(case)[-len(case.outside) :], [p.detach() for p in case.outside])


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("make", BY_CODE, ids=name_of)
def test_what_a_step_or_hook_reaches_besides_is_one_warning(
    make: Callable[[], Case], cell: str, tmp_path: Path
) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        ours = by_weft(make, cell, held=False, folder=tmp_path)
    assert [UNSEEN in str(w.message) for w in told] == [True] * (2 if cell == "resume" else 1)
    assert same(ours, by_hand(make(), cell, held=False)) or cell == "64-true"


def test_with_the_look_switched_off_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weft.step.trained, "outside_of", lambda state: {})
    monkeypatch.setattr(weft.step.trained, "LOOKS", 1)
    for make in BY_NODES:
        case = make()
        before = [p.detach().clone() for p in case.outside]
        weft.Trainer(epochs=1, progress=False).fit(case.problem, weft.Data(data(), batch_size=BATCH))
        assert same(before, [p.detach() for p in case.outside])  # silently untrained


def test_without_the_others_a_resumed_run_ends_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    theirs = by_hand(closure(), "resume", held=True)
    assert same(by_weft(closure, "resume", True, tmp_path / "a"), theirs)
    monkeypatch.setattr(weft.loop.phases, "adopt", lambda state: None)
    monkeypatch.setattr(weft.step.trained, "outside_of", lambda state: {})
    monkeypatch.setattr(weft.step.trained, "LOOKS", 1)
    assert not same(by_weft(closure, "resume", True, tmp_path / "b"), theirs)


# ---- other members of the kind


def inverse(w: nn.Parameter) -> weft.Problem:
    """Learns w = 3 beside a registered net."""
    torch.manual_seed(1)
    net = weft.Node(nn.Linear(1, 1), ["x"], ["v"], name="a")
    terms = [weft.objective(lambda u, y: (u - y) ** 2, name="m"), weft.objective(lambda v, y: (v - y) ** 2, name="r")]
    return weft.Problem([net, weft.Node(lambda x: w * x, ["x"], ["u"], name="b")], terms)


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_a_parameter_of_the_users_optimizer_alone_trains_in_every_precision(precision: str) -> None:
    w = nn.Parameter(torch.tensor(1.0))
    optimizer = {"optimizer": lambda q: torch.optim.Adam([*q, w], lr=0.1)}
    weft.Trainer(epochs=100, progress=False, precision=precision, **optimizer).fit(inverse(w), data())
    assert w.item() == pytest.approx(3.0, abs=0.05)
    assert w.dtype == (torch.float32 if precision == "32-true" else torch.float64)


def test_the_best_weights_hold_what_only_the_optimizer_holds() -> None:
    w = nn.Parameter(torch.tensor(1.0))
    problem = inverse(w)
    rates = {"on_epoch_start": lambda trainer: trainer.optimizer.param_groups[0].update(lr=0.3)}
    trainer = weft.Trainer(
        epochs=9, progress=False, hooks=[rates], optimizer=lambda q: torch.optim.SGD([*q, w], lr=0.3, momentum=0.95)
    )
    result = trainer.fit(problem, weft.Data(data(), data(), batch_size=BATCH))
    assert result.best_epoch is not None and result.best_epoch < 8
    assert trainer.validate()["dev_loss"] == pytest.approx(result.best_metric, rel=1e-6)
    assert "optimizer.default.2" not in result.last_weights  # the problem's own names only


def test_an_optimizer_instance_with_a_frozen_parameter_keeps_its_identity_in_float64() -> None:
    w = nn.Parameter(torch.tensor(1.0), requires_grad=False)
    problem = inverse(w)
    optimizer = torch.optim.Adam([*problem.parameters(), w], lr=0.1)
    thaw = {"on_epoch_start": lambda trainer: w.requires_grad_(trainer.current_epoch >= 1)}
    weft.Trainer(epochs=60, progress=False, precision="64-true", optimizer=optimizer, hooks=[thaw]).fit(problem, data())
    assert w.item() == pytest.approx(3.0, abs=0.2) and w.dtype == torch.float64


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_what_a_function_changes_in_place_is_kept_and_resumed(precision: str, tmp_path: Path) -> None:
    def make() -> tuple[weft.Problem, Tensor]:
        count = torch.zeros(1)

        def counted(x: Tensor) -> Tensor:
            count.add_(1.0)
            return x * 0 + count

        return nodes(counted), count

    kept = {"checkpoint": True, "root_dir": str(tmp_path), "run_name": "r", "progress": False, "precision": precision}
    problem, count = make()
    weft.Trainer(epochs=3, **kept).fit(problem, weft.Data(data(), batch_size=BATCH))
    assert count.item() == 18.0 and count.dtype == torch.float32
    problem, count = make()
    weft.Trainer(epochs=5, **kept, resume="auto").fit(problem, weft.Data(data(), batch_size=BATCH))
    assert count.item() == 30.0


def test_constants_that_no_function_changes_are_not_in_the_checkpoint(tmp_path: Path) -> None:
    table = torch.ones(1)
    trainer = weft.Trainer(
        epochs=1, progress=False, precision="64-true", checkpoint=True, root_dir=str(tmp_path), run_name="r"
    )
    trainer.fit(nodes(lambda x: x * table), data())
    assert not [name for name in trainer.run.state_dict()["module_state"] if "table" in name]


def made_inside(trainer: Any, batch: dict[str, Any]) -> Tensor:
    """Inputs that require grad, an adversarial point, the weights of an inner loop; kept, too."""
    x = batch["x"].clone().requires_grad_()
    trainer.state["point"] = noise = torch.zeros_like(x, requires_grad=True)
    (slope,) = torch.autograd.grad(trainer.problem({**batch, "x": x + noise})["train_loss"], noise, create_graph=True)
    inner = torch.ones(1, requires_grad=True)
    (step,) = torch.autograd.grad((inner * x.detach() - batch["y"]).square().mean(), inner, create_graph=True)
    return trainer.problem({**batch, "x": x + 0.1 * slope.sign()})["train_loss"] + (inner - step).square().sum()


def test_nothing_is_said_of_what_the_step_makes_itself_of_batches_and_of_frozen_parts() -> None:
    def fit(problem: nn.Module, given: Any = None, **options: Any) -> None:
        options = options if "phases" in options else {"epochs": 2, **options}
        weft.Trainer(progress=False, **options).fit(problem, data() if given is None else given)

    fit(nodes(lambda x: x), training_step=made_inside)
    fit(nodes(lambda x: x), weft.Data(data(), inputs_require_grad=("x",)))
    leaves = [{k: v.clone().requires_grad_(k == "x") for k, v in data().items()}]
    step = {"training_step": lambda trainer, batch: trainer.problem(batch)["train_loss"] + 0 * leaves[0]["x"].sum()}
    fit(nodes(lambda x: x), leaves, **step)
    torch.manual_seed(0)
    two = Plain(lambda s, x: s.a(s.b(x)), a=nn.Linear(1, 1), b=nn.Linear(1, 1))
    fit(two, optimizer=torch.optim.SGD(two.a.parameters(), lr=0.1))
    fit(two, phases=[weft.Phase(epochs=2, freeze=["b"])])
    teacher = nn.Linear(1, 1)
    with torch.no_grad():
        fit_of = teacher(data()["x"])
    fit(nodes(lambda x: x + 0 * fit_of.mean()))


def test_a_teacher_under_no_grad_is_no_finding_and_one_with_gradients_is() -> None:
    teacher = nn.Linear(1, 1)

    def quiet(x: Tensor) -> Tensor:
        with torch.no_grad():
            return teacher(x)

    weft.Trainer(epochs=1, progress=False).fit(nodes(quiet), data())
    with pytest.raises(ValueError, match=r"node 'b' uses teacher.weight of shape \(1, 1\), teacher.bias"):
        weft.Trainer(epochs=1, progress=False).fit(nodes(lambda x: teacher(x)), data())


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": lambda q: torch.optim.LBFGS(q)},
        {"optimizer": lambda q: torch.optim.SGD(q, lr=0.1), "accumulate": 3},
        {"phases": [weft.Phase(epochs=1), weft.Phase(epochs=1, setup=lambda trainer: LATE.append(k()))]},
    ],
    ids=["line search", "accumulate", "a later phase"],
)
def test_the_look_is_taken_in_every_update_and_phase(options: dict[str, Any]) -> None:
    LATE.clear()
    if "phases" not in options:
        LATE.append(k())
    problem = nodes(lambda x: x * sum(LATE) if LATE else x)
    with pytest.raises(ValueError, match=UNSEEN):
        weft.Trainer(progress=False, **(options if "phases" in options else {"epochs": 2, **options})).fit(
            problem, weft.Data(data(), batch_size=BATCH)
        )


LATE: list[nn.Parameter] = []


def test_updates_and_loops_of_ones_own_are_looked_at() -> None:
    w = k()

    class Own(weft.Trainer):
        def update(self, batch: Any) -> Tensor:
            loss = self.problem(batch)["train_loss"] * w.sum()
            self.backward(loss)
            self.step()
            return loss

    with pytest.warns(UserWarning, match=f"uses w of shape .*{UNSEEN}") as told:
        Own(epochs=2, progress=False).fit(nodes(lambda x: x), weft.Data(data(), batch_size=BATCH))
    assert len(told) == 1
    ways = (lambda run, loss: run.backward(loss), lambda run, loss: loss.backward())  # ours, and torch's own
    for backward in ways:
        started = weft.Trainer(epochs=1, progress=False).start(nodes(lambda x: w * x), data())
        with pytest.raises(ValueError, match=UNSEEN), started as run:
            for _ in run.epochs():
                for batch in run.batches("train"):
                    backward(run, run.problem(batch)["train_loss"])
                    run.step()


def test_several_optimizers_share_the_look() -> None:
    w = k()
    torch.manual_seed(0)
    two = Plain(lambda s, x: s.a(x) + s.b(x), a=nn.Linear(1, 1), b=nn.Linear(1, 1))
    optimizers = {name: (lambda q: torch.optim.SGD(q, lr=0.1)) for name in ("a", "b")}

    def step(trainer: Any, batch: Any) -> dict[str, Tensor]:
        loss = two(batch)["train_loss"]
        return {"a": loss, "b": loss * w.sum()}

    last = {"monitor_metric": False}  # a sum of the losses says nothing
    trainer = weft.Trainer(epochs=1, progress=False, optimizer=optimizers, training_step=step, **last)
    with pytest.warns(UserWarning, match=UNSEEN):
        trainer.fit(two, data())


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_lightning_module_is_warned_of_what_it_closes_over() -> None:
    import lightning.pytorch as lp

    w = k()

    class Module(lp.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(1, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return (self.net(batch["x"]) * w - batch["y"]).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    loader = torch.utils.data.DataLoader(weft.DictDataset(data()), batch_size=8)
    with pytest.warns(UserWarning, match=f"uses w of shape .*{UNSEEN}"):
        weft.Trainer(epochs=1, progress=False).fit(Module(), train_dataloaders=loader)
