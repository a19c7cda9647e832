"""Node, Rollout and Problem against raw PyTorch and NeuroMANCER's own classes; what a trainer asks of any problem."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from weft.problem.constraints import equal, greater_equal, less_equal
from weft.problem.lagrangian import AugmentedLagrangian
from weft.problem.losses import PenaltyLoss
from weft.problem.nodes import Node
from weft.problem.outputs import forward_nodes
from weft.problem.problem import Problem
from weft.problem.reading import (
    is_neuromancer,
    needs_grad_in_eval,
    term_keys,
)
from weft.problem.rollout import Rollout
from weft.problem.terms import objective
from weft.problem.weights import set_term_weights, term_weights

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import neuromancer.loss as nm_loss
    import neuromancer.problem as nm_problem
    import neuromancer.system as nm_system
    from neuromancer.constraint import variable


def small_net(inputs: int, outputs: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs))


def small_problem(**kwargs: Any) -> Problem:
    return Problem(
        [
            Node(small_net(3, 2), ["a", "p"], ["x"], name="solution"),
            Node(lambda x: x.sum(-1), ["x"], ["s"], name="sum"),
        ],
        [objective(lambda x, target: (x - target) ** 2, weight=2.0, name="f")],
        [less_equal("s", 0.5, weight=3.0, name="limit")],
        **kwargs,
    )


def small_batch(rows: int = 5, **extra: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(rows)
    tensors = {k: torch.randn(rows, n, generator=generator) for k, n in (("a", 2), ("p", 1), ("target", 2))}
    return {**tensors, "name": "train", "epoch": 0, "index": torch.arange(rows), **extra}


# ---------------------------------------------------------------------------------------------------------------- node


def test_a_module_with_one_argument_gets_its_inputs_concatenated_and_a_function_gets_them_apart():
    net, batch = small_net(3, 2), small_batch()
    out = Node(net, ["a", "p"], ["x"])(batch)
    assert torch.equal(out["x"], net(torch.cat([batch["a"], batch["p"]], -1)))
    assert not torch.equal(out["x"], net(torch.cat([batch["p"], batch["a"]], -1)))
    assert torch.equal(Node(lambda a, p: a * p, ["a", "p"], ["x"])(batch)["x"], batch["a"] * batch["p"])
    pair = nn.Bilinear(2, 1, 3)
    assert torch.equal(Node(pair, ["a", "p"], ["x"])(batch)["x"], pair(batch["a"], batch["p"]))


def test_several_outputs_are_a_tuple_or_a_list_in_the_order_of_the_keys():
    for make in (tuple, list):
        out = Node(lambda a, make=make: make([a + 1, a + 2]), ["a"], ["b", "c"])({"a": torch.zeros(1)})
        assert (float(out["b"]), float(out["c"])) == (1.0, 2.0)


@pytest.mark.parametrize(
    ("returned", "outputs", "words"),
    [
        (lambda a: (a, a, a), ["b", "c"], r"node 'n' returned 3 values; expected 2 for the keys \['b', 'c'\]"),
        (lambda a: a, ["b", "c"], "node 'n' returned one Tensor; expected 2"),
        (lambda a: (a, a), ["b"], "node 'n' returned 2 values; expected 1"),
        (lambda a: {"b": a}, ["b"], "node 'n' returned one dict; expected 1"),
    ],
)
def test_a_wrong_number_of_outputs_is_an_error_naming_node_and_keys(returned, outputs, words):
    with pytest.raises(TypeError, match=words):
        Node(returned, ["a"], outputs, name="n")({"a": torch.zeros(1)})


def test_a_node_that_cannot_take_its_inputs_is_an_error_when_it_is_built():
    with pytest.raises(TypeError, match=r"node 'n' gives 2 inputs to \(a\)"):
        Node(lambda a: a, ["a", "b"], ["c"], name="n")
    with pytest.raises(TypeError, match="node 'bilinear' gives 1 inputs"):
        Node(nn.Bilinear(2, 1, 3), ["a"], ["c"])
    with pytest.raises(TypeError, match="function or module"):
        Node("net", ["a"], ["b"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no outputs"):
        Node(lambda a: a, ["a"], [])
    with pytest.raises(ValueError, match="writes 'b' twice"):
        Node(lambda a: a, ["a"], ["b", "b"])
    with pytest.raises(TypeError, match="keys are texts; got 3"):
        Node(lambda a: a, [3], ["b"])  # type: ignore[list-item]


def test_a_node_is_named_by_its_function_and_one_key_may_be_a_plain_text():
    def plant(x: Tensor) -> Tensor:
        return x

    assert [Node(plant, "x", "y").name, Node(nn.Tanh(), ["x"], ["y"]).name] == ["plant", "tanh"]
    assert Node(plant, "state", "next").input_keys == ["state"]
    assert repr(Node(plant, ["x"], ["y"])) == "Node plant(x) -> y"


def test_a_missing_key_is_an_error_naming_node_key_and_the_closest_there_is():
    with pytest.raises(KeyError) as caught:
        Node(lambda state: state, ["state"], ["y"], name="n")({"stae": torch.zeros(1), "epoch": 0, "name": "train"})
    message = str(caught.value)
    assert message == (
        "node 'n' reads 'state', which neither the data nor an earlier node provides; "
        "there are ['stae']; did you mean 'stae'?"
    )


def test_an_error_inside_a_node_says_in_which_with_the_shapes():
    with pytest.raises(RuntimeError) as caught:
        Node(small_net(3, 2), ["a", "p"], ["x"], name="n")({"a": torch.zeros(2, 3, 1), "p": torch.zeros(2, 1)})
    assert caught.value.__notes__ == ["raised in node 'n', which reads a (2, 3, 1), p (2, 1)"]


def test_the_module_of_a_method_is_trained():
    net = small_net(1, 1)
    assert len(list(Node(net.forward, ["x"], ["y"]).parameters())) == 4


# ------------------------------------------------------------------------------------------------------------- rollout

A, B, E = torch.tensor([[1.2, 1.0], [0.0, 1.0]]), torch.tensor([[1.0], [0.5]]), torch.tensor([[0.3], [-0.1]])


def loops(with_disturbance: bool, steps: int) -> tuple[Any, Rollout]:
    """A double integrator with a neural policy, in NeuroMANCER and here, sharing the policy."""
    policy = small_net(2, 1)
    if with_disturbance:
        plant, reads = (lambda x, u, d: x @ A.T + u @ B.T + d @ E.T), ["x", "u", "d"]
    else:
        plant, reads = (lambda x, u: x @ A.T + u @ B.T), ["x", "u"]
    theirs = nm_system.System(
        [nm_system.Node(policy, ["x"], ["u"], name="policy"), nm_system.Node(plant, reads, ["x"], name="plant")],
        nsteps=steps,
    )
    return theirs, Rollout([Node(policy, ["x"], ["u"]), Node(plant, reads, ["x"], name="plant")], steps)


@pytest.mark.parametrize("with_disturbance", [False, True])
@pytest.mark.parametrize("steps", [1, 7])
def test_a_rollout_is_neuromancers_system_in_values_and_gradients(with_disturbance, steps):
    theirs, ours = loops(with_disturbance, steps)
    data = {"x": torch.randn(5, 1, 2), "d": torch.randn(5, steps, 1)}
    expected, out = theirs(dict(data)), ours(data)
    assert out["x"].shape == (5, steps + 1, 2) and out["u"].shape == (5, steps, 1) and set(out) == {"x", "u"}
    for key in ("x", "u"):
        torch.testing.assert_close(out[key], expected[key], rtol=0, atol=0)
    parameters = list(ours.parameters())
    losses = [(r["x"] ** 2).mean() + 0.1 * (r["u"] ** 2).mean() for r in (expected, out)]
    for theirs_, ours_ in zip(*(torch.autograd.grad(value, parameters) for value in losses), strict=True):
        torch.testing.assert_close(ours_, theirs_, rtol=1e-6, atol=1e-7)
        assert ours_.abs().sum() > 0
    data["x"] = data["x"] + 0.01
    assert not torch.equal(ours(data)["x"], expected["x"])


def test_a_state_given_with_several_entries_goes_on_after_the_last_as_in_neuromancer():
    theirs, ours = loops(False, 4)
    data = {"x": torch.randn(3, 2, 2)}
    expected, out = theirs(dict(data)), ours(data)
    assert out["x"].shape == (3, 6, 2)
    torch.testing.assert_close(out["x"], expected["x"], rtol=0, atol=0)


def test_what_has_no_time_is_constant_and_a_state_without_time_is_its_first_entry():
    _, ours = loops(True, 4)
    x, d = torch.randn(3, 2), torch.randn(3, 1)
    constant = ours({"x": x, "d": d})
    signal = ours({"x": x[:, None], "d": d[:, None].expand(3, 4, 1)})
    assert torch.equal(constant["x"], signal["x"]) and constant["x"].shape == (3, 5, 2)


def test_the_steps_of_a_rollout_may_change_between_epochs():
    _, ours = loops(False, 2)
    data = {"x": torch.randn(3, 1, 2)}
    short = ours(data)["x"]
    ours.steps = 6
    assert ours(data)["x"].shape == (3, 7, 2) and torch.equal(ours(data)["x"][:, :3], short)
    ours.steps = 0
    with pytest.raises(ValueError, match="rollout 'rollout': steps must be an int >= 1; got 0"):
        ours(data)


def test_a_rollout_says_which_signal_is_too_short_missing_or_of_the_wrong_shape():
    _, ours = loops(True, 5)
    x, d = torch.randn(3, 1, 2), torch.randn(3, 5, 1)
    with pytest.raises(ValueError, match="'d' has 4 time entries, 5 are needed for 5 steps"):
        ours({"x": x, "d": d[:, :4]})
    with pytest.raises(ValueError, match="'x' has 0 time entries, 1 are needed"):
        ours({"x": x[:, :0], "d": d})
    with pytest.raises(KeyError, match=r"rollout 'rollout' reads 'd', .* there are \['x'\]"):
        ours({"x": x})
    with pytest.raises(ValueError, match=r"'d' has shape \(3,\); expected \(batch, time, features\)"):
        ours({"x": x, "d": torch.zeros(3)})
    with pytest.raises(ValueError, match="Rollout 'rollout' has several nodes named 'f'|several nodes named 'f'"):
        Rollout([Node(lambda x: x, ["x"], ["u"], name="f"), Node(lambda u: u, ["u"], ["x"], name="f")], 2)


def test_a_rollout_in_a_problem_and_a_neuromancer_system_in_it_give_the_same_loss():
    theirs, ours = loops(True, 6)
    theirs.name = "loop"
    batch = {"x": torch.randn(5, 1, 2), "d": torch.randn(5, 6, 1), "name": "train", "epoch": 0}
    terms = ([objective(lambda x, u: (x**2).sum(-1).mean(), name="f")], [less_equal("u", 0.1, name="c")])
    one, other = Problem([ours], *terms), Problem([theirs], *terms)
    assert set(one(batch)) == set(other(batch)) and "d" not in other(batch) and "name" not in other(batch)
    assert torch.equal(one(batch)["train_loss"], other(batch)["train_loss"])
    assert sorted(one.inputs) == sorted(other.inputs) == ["d", "x"]


# ------------------------------------------------------------------------------------------------------------- problem


def test_a_problem_computes_what_raw_pytorch_computes():
    problem, batch = small_problem(), small_batch()
    out = problem(batch)
    net = problem.nodes[0].fn  # type: ignore[union-attr]
    x = net(torch.cat([batch["a"], batch["p"]], -1))  # type: ignore[operator]
    f = 2.0 * ((x - batch["target"]) ** 2).mean()
    limit = torch.relu(x.sum(-1) - 0.5).mean()
    truth = {"train_f": f, "train_limit": 3.0 * limit, "train_limit_violation": limit, "train_objective_loss": f}
    truth |= {"x": x, "s": x.sum(-1), "train_penalty_loss": 3.0 * limit, "train_loss": f + 3.0 * limit}
    assert set(out) == set(truth)
    assert all(torch.equal(out[k], truth[k]) for k in truth)
    assert not torch.equal(problem(small_batch(6))["train_loss"], truth["train_loss"])


def test_the_split_names_the_losses_and_train_is_meant_without_one():
    problem, batch = small_problem(), small_batch()
    assert "dev_loss" in problem({**batch, "name": "dev"})
    assert "train_loss" in problem({k: v for k, v in batch.items() if k != "name"})


def test_step_runs_the_nodes_without_targets_and_leaves_the_batch_alone():
    problem, batch = small_problem(), small_batch()
    del batch["target"]
    keys = list(batch)
    out = problem.step(batch)
    assert set(out) == {"x", "s"} and list(batch) == keys
    with pytest.raises(KeyError, match="objective 'f' reads 'target'"):
        problem(batch)


def test_terms_are_found_by_name_and_unnamed_ones_are_numbered_by_place():
    problem = Problem(
        [], [objective(lambda x: x), objective(lambda x: x, name="g")], [equal("x", 1.0), equal("x", 2.0)]
    )
    assert list(problem.terms) == ["objective_0", "g", "constraint_0", "constraint_1"]
    assert problem.terms["constraint_1"].keys == ["x"]


def node(reads: list[str], writes: list[str], name: str) -> Node:
    return Node(lambda *values: values, reads, writes, name=name)


@pytest.mark.parametrize(
    ("nodes", "terms", "words"),
    [
        ([node(["a"], ["b"], "n"), node(["a"], ["c"], "n")], {}, "several nodes named 'n'"),
        ([node(["a"], ["b"], "n"), node(["a"], ["b"], "m")], {}, "nodes 'n' and 'm' both write 'b'"),
        (
            [node(["b"], ["c"], "n"), node(["a"], ["b"], "m")],
            {},
            "node 'n' reads 'b', which only the later node 'm' writes",
        ),
        ([node(["a"], ["epoch"], "n")], {}, "node 'n' writes 'epoch'"),
        ([], {"objectives": [objective(lambda a: a, name="f")] * 2}, "would report 'f' twice"),
        ([], {"objectives": [objective(lambda a: a, name="loss")]}, "would report 'loss' twice"),
        (
            [],
            {"objectives": [objective(lambda a: a, name="c_violation")], "constraints": [equal("a", 1, name="c")]},
            "would report 'c_violation' twice",
        ),
        ([node(["a"], ["f"], "n")], {"objectives": [objective(lambda a: a, name="f")]}, "'f' is both a node's output"),
        ([node(["a"], ["dev_loss"], "n")], {}, "'dev_loss' is both a node's output"),
        ([node(["a"], ["b"], "n")], {"objectives": []}, "nothing to minimise"),
    ],
)
def test_a_problem_that_contradicts_itself_is_refused_when_it_is_built(nodes, terms, words):
    with pytest.raises(ValueError, match=words):
        Problem(nodes, **({"objectives": [objective(lambda a: a, name="g")]} | terms), name="p")


def test_nodes_without_a_name_that_would_have_the_same_are_named_by_what_they_compute():
    def net() -> nn.Linear:
        return nn.Linear(1, 1)

    def of(*nodes: Any) -> list[Any]:
        made = Problem(nodes, [objective(lambda x: x)])
        assert all(made.nodes[i].fn is node.fn for i, node in enumerate(nodes))
        return [n.name for n in made.nodes]

    assert of(Node(net(), ["x"], ["u"]), Node(net(), ["u"], ["v"])) == ["linear_u", "linear_v"]
    assert of(Node(net(), ["x"], ["u"]), Node(nn.Tanh(), ["u"], ["v"])) == ["linear", "tanh"]  # as ever
    pair = Node(lambda x: (x, x), ["x"], ["a.u", "a.v"]), Node(lambda x: x, ["x"], ["w"])
    assert of(*pair, Node(net(), ["w"], ["z"], name="n")) == ["node_u_v", "node_w", "n"]
    with pytest.raises(ValueError, match="several nodes named 'linear_u'"):
        of(Node(net(), ["x"], ["a.u"]), Node(net(), ["x"], ["b.u"]))
    loop = Rollout([Node(net(), ["x"], ["u"]), Node(net(), ["u"], ["x"])], 2)
    assert [n.name for n in loop.nodes] == ["linear_u", "linear_x"]


def test_a_list_of_nodes_may_stand_among_the_nodes():
    nodes = Node(nn.Linear(1, 1), ["x"], ["u"], name="net").on("a", "b")
    last = Node(lambda u: u, ["a.u"], ["w"], name="last")
    assert list(Problem([nodes, last], [objective(lambda w: w)]).nodes) == [*nodes, last]
    assert list(Problem([*nodes, last], [objective(lambda w: w)]).nodes) == [*nodes, last]
    assert list(Rollout([[Node(lambda x: x, ["x"], ["x"])]], 2).nodes)
    with pytest.raises(TypeError, match="'no' is no node"):
        Problem([[nodes[0], "no"]], [objective(lambda w: w)])


def test_what_is_no_node_term_or_loss_is_refused_with_how_to_make_one():
    f = objective(lambda x: x, name="f")
    with pytest.raises(TypeError, match="is no node; wrap it: weft.Node"):
        Problem([nn.Linear(1, 1)], [f])
    with pytest.raises(TypeError, match=r"no objective; make it with weft.objective\(fn\)"):
        Problem([], [lambda x: x])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="no constraint; make it with weft.less_equal"):
        Problem([], [f], [f])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"instance such as weft.PenaltyLoss\(\)"):
        Problem([], [f], loss=PenaltyLoss)  # type: ignore[arg-type]


def test_a_key_that_nothing_provides_is_found_on_the_first_batch():
    problem = Problem([Node(lambda a: a, ["a"], ["b"])], [objective(lambda d: d, name="f")])
    with pytest.raises(KeyError, match=r"objective 'f' reads 'd', which neither .* there are \['a', 'b'\]"):
        problem({"a": torch.ones(1), "name": "train"})
    theirs = nm_system.Node(lambda a: a, ["a"], ["b"], name="theirs")
    with pytest.raises(KeyError, match="node 'theirs' reads 'a'"):
        Problem([theirs], [objective(lambda b: b)])({"A": torch.ones(1)})


def test_a_node_may_replace_what_it_reads_and_a_nested_batch_reaches_functions_as_it_is():
    problem = Problem([Node(lambda x: 2 * x, ["x"], ["x"], name="scale")], [objective(lambda x: x, name="f")])
    assert float(problem({"x": torch.ones(3)})["train_f"]) == 2.0 and problem.inputs == ["x"]
    nested = Problem([], [objective(lambda interior, boundary: interior["x"].mean() + boundary["x"].mean())])
    assert float(nested({"interior": {"x": torch.ones(5)}, "boundary": {"x": torch.ones(2)}})["train_loss"]) == 2.0


def test_describe_says_who_reads_and_writes_what_and_what_the_data_must_bring():
    lines = small_problem().describe().splitlines()
    words = [line.split() for line in lines]
    assert ["solution", "a,", "p", "x"] in words and ["sum", "x", "s"] in words
    assert ["f", "(objective)", "x,", "target", "2"] in words and ["limit", "(constraint", "<=)", "s", "3"] in words
    assert "from the data: a, p, target" in lines and "loss: PenaltyLoss" in lines
    assert small_problem().inputs == ["a", "p", "target"]


def test_the_repr_of_a_problem_is_one_line():
    assert repr(small_problem(name="toy")) == (
        "Problem 'toy': solution(a, p) -> x; sum(x) -> s | terms f, limit | PenaltyLoss | 50 parameters"
    )


def test_a_problem_is_copied_saved_and_cast_like_any_module():
    problem, batch = small_problem(), small_batch()
    assert list(problem.state_dict()) == [f"nodes.0.fn.{i}.{k}" for i in (0, 2) for k in ("weight", "bias")]
    double = copy.deepcopy(problem).double()
    out = double({k: v.double() if k in ("a", "p", "target") else v for k, v in batch.items()})
    assert {v.dtype for v in out.values()} == {torch.float64}
    torch.testing.assert_close(out["train_loss"].float(), problem(batch)["train_loss"])


# ------------------------------------------------------------------------------------------ what any problem is asked


def neuromancer_problem(**kwargs: Any) -> Any:
    x, p = (variable(key) for key in ("x", "p"))  # pyright: ignore[reportCallIssue]
    named = ((x - p) ** 2).minimize(weight=2.0, name="f")
    unnamed = (x**2).minimize()
    c, d = 5.0 * (x <= p), 0.5 * (x >= -1.0)
    c.update_name("c")
    return nm_problem.Problem(
        [nm_system.Node(small_net(1, 1), ["p"], ["x"], name="net")],
        nm_loss.PenaltyLoss([named, unnamed], [c, d]),
        **kwargs,
    )


class Plain(nn.Module):
    def __init__(self, returns: str = "dict") -> None:
        super().__init__()
        self.w, self.returns = nn.Parameter(torch.ones(1)), returns

    def forward(self, batch):
        y = self.w * batch["x"]
        return (
            {"y": y, "train_loss": y.mean(), "loss": y.mean(), "note": "text"} if self.returns == "dict" else y.mean()
        )


def test_a_neuromancer_problem_is_known_by_its_shape():
    assert is_neuromancer(neuromancer_problem())
    assert not is_neuromancer(small_problem()) and not is_neuromancer(Plain()) and not is_neuromancer(nn.Sequential())


def test_term_keys_name_every_scalar_to_report_and_no_other():
    keys = term_keys(small_problem(), "dev")
    assert keys is not None and list(keys) == ["dev_f", "dev_limit", "dev_limit_violation"] + [
        "dev_objective_loss",
        "dev_penalty_loss",
        "dev_loss",
    ]
    out = small_problem()({**small_batch(), "name": "dev"})
    assert all(out[key].ndim == 0 for key in keys.values()) and set(keys.values()) == set(out) - {"x", "s"}
    assert term_keys(Plain(), "dev") is None


def test_neuromancers_terms_are_read_by_name_without_memory_addresses():
    problem = neuromancer_problem()
    keys = term_keys(problem, "train")
    assert keys is not None and list(keys)[:2] == ["train_f", "train_objective_1"]
    assert "train_c" in keys and "train_c_violation" in keys and not any("0x" in name for name in keys)
    p = torch.rand(6, 1)
    out = problem({"p": p, "name": "train"})
    x = out["train_x"]
    torch.testing.assert_close(out[keys["train_f"]], 2.0 * ((x - p) ** 2).mean())
    torch.testing.assert_close(out[keys["train_objective_1"]], (x**2).mean())
    torch.testing.assert_close(out[keys["train_c_violation"]].mean(), torch.relu(x - p).mean())
    torch.testing.assert_close(out[keys["train_c"]], 5.0 * torch.relu(x - p).mean())
    parts = [out[keys[name]] for name in keys if not name.endswith(("_violation", "_loss"))]
    assert len(parts) == 4
    torch.testing.assert_close(torch.stack(parts).sum(), out[keys["train_loss"]])


@pytest.mark.parametrize(("make", "name"), [(small_problem, "limit"), (neuromancer_problem, "c")])
def test_term_weights_are_read_and_set_by_name(make, name):
    problem, batch = make(), small_batch()
    if is_neuromancer(problem):
        batch = {"p": batch["p"], "name": "train"}
    before = problem(dict(batch))["train_penalty_loss"].detach()
    assert float(term_weights(problem)[name]) in (3.0, 5.0)
    for weight in (0.0, torch.tensor(0.25)):
        set_term_weights(problem, {name: weight, "f": 1.0})
        assert float(term_weights(problem)[name]) == float(weight) and float(term_weights(problem)["f"]) == 1.0
    assert not torch.equal(problem(dict(batch))["train_penalty_loss"], before)
    with pytest.raises(ValueError, match="no term 'ff': its terms are .*; did you mean 'f'?"):
        set_term_weights(problem, {name: 9.0, "ff": 1.0})
    assert float(term_weights(problem)[name]) == 0.25  # all or none


def test_a_plain_module_has_no_term_weights():
    assert term_weights(Plain()) == {}
    with pytest.raises(ValueError, match="it has no named terms"):
        set_term_weights(Plain(), {"f": 1.0})


def test_gradients_in_evaluation_are_asked_for_by_any_part():
    for make in (small_problem, neuromancer_problem):
        assert needs_grad_in_eval(make(grad_inference=True).modules())
        assert not needs_grad_in_eval(make().modules())
    inner = Plain()
    inner.grad_inference = True  # type: ignore[assignment]
    assert needs_grad_in_eval(nn.Sequential(inner).modules())


def test_prediction_gives_the_tensors_of_the_nodes_without_inputs_and_losses():
    batch = {k: v for k, v in small_batch().items() if k != "target"}
    assert set(forward_nodes(small_problem())(batch)) == {"x", "s"}
    assert set(forward_nodes(neuromancer_problem())({**batch})) == {"x"}
    out = forward_nodes(Plain())({"x": torch.ones(3), "name": "train"})
    assert set(out) == {"y"} and torch.equal(out["y"], torch.ones(3))
    with pytest.raises(TypeError, match="Plain returned Tensor. Return a dict, or pass a predict_step"):
        forward_nodes(Plain("scalar"))({"x": torch.ones(3)})


def test_a_rollout_state_that_stands_under_the_key_of_an_input_is_predicted():
    theirs, ours = loops(True, 3)
    theirs.name = "loop"
    batch = {"x": torch.randn(2, 1, 2), "d": torch.randn(2, 3, 1), "name": "test"}
    f = objective(lambda x: x**2, name="f")
    assert set(forward_nodes(Problem([ours], [f]))(batch)) == {"x", "u"}
    nm = nm_problem.Problem([theirs], nm_loss.PenaltyLoss([(variable("x") ** 2).minimize(name="f")], []))  # pyright: ignore[reportCallIssue]
    predicted = forward_nodes(nm)(batch)
    assert set(predicted) == {"x", "u"} and predicted["x"].shape == (2, 4, 2)


def test_a_greater_equal_problem_with_multipliers_reads_the_same_terms():
    problem = Problem(
        [], [objective(lambda x: x, name="f")], [greater_equal("x", 0.0, name="c")], AugmentedLagrangian()
    )
    out = problem({"x": torch.ones(2, 1), "index": torch.arange(2)})
    keys = term_keys(problem, "train")
    assert keys is not None and set(keys.values()) == set(out)
