"""The problem: what maps a batch to named outputs and one loss. Node, Rollout, Problem.

    net = weft.Node(mlp, ["a", "p"], ["x"], name="solution")
    problem = weft.Problem([net], objectives=[weft.objective(rosenbrock)], constraints=[weft.less_equal("x", 1.0)])
    problem({"a": a, "p": p, "name": "train"})["train_loss"].backward()
    print(problem.describe())

The functions at the end read any problem: weft's, NeuroMANCER's (known by its shape, never imported), a plain module.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from weft.drawing import Drawing, draw
from weft.losses import PenaltyLoss
from weft.terms import RESERVED_KEYS, Constraint, MissingKeyError, Objective, Term, explain, function_name
from weft.types import Batch, suggest


class Node(nn.Module):
    """`fn(*inputs)` under names: reads the keys `inputs`, returns a dict of the keys `outputs`.

    fn: any function of tensors; a module with a single argument without default gets several inputs concatenated on the
        last axis. Several outputs are returned as a tuple, in the order of `outputs`.
    name: defaults to the function's, or to the module's class in lower case.
    Raises TypeError where `fn` cannot take that many inputs, or returns another number of outputs.
    """

    def __init__(
        self, fn: Callable[..., Any], inputs: Sequence[str], outputs: Sequence[str], name: str | None = None
    ) -> None:
        super().__init__()
        if not callable(fn):
            raise TypeError(f"A node is made of a function or module; got {type(fn).__name__} {fn!r}.")
        self.name = name or function_name(fn) or "node"
        self.input_keys, self.output_keys = _keys(inputs, self), _keys(outputs, self)
        if not self.output_keys:
            raise ValueError(f"{self} has no outputs; name at least one key.")
        if duplicates := _duplicates(self.output_keys):
            raise ValueError(f"{self} writes {duplicates[0]!r} twice; give each output its own key.")
        self.fn = fn
        if isinstance(owner := getattr(fn, "__self__", None), nn.Module):
            self.owner = owner  # of a bound method; its parameters are trained too
        self._concatenates = self._check_arity()

    def _check_arity(self) -> bool:
        """Whether the inputs are concatenated. Raises TypeError if they are more or fewer than `fn` takes."""
        try:
            signature = inspect.signature(self.fn.forward if isinstance(self.fn, nn.Module) else self.fn)
        except (TypeError, ValueError):  # a builtin does not tell
            return False
        required = [p for p in signature.parameters.values() if p.default is p.empty]
        one = len(required) == 1 and required[0].kind in (inspect.Parameter.POSITIONAL_ONLY, _PLAIN)
        if isinstance(self.fn, nn.Module) and one and len(self.input_keys) > 1:
            return True
        try:
            signature.bind(*self.input_keys)
        except TypeError as error:
            raise TypeError(f"{self} gives {len(self.input_keys)} inputs to {signature}: {error}.") from None
        return False

    def forward(self, data: Batch) -> dict[str, Tensor]:
        """The outputs by key. Raises KeyError for a key that is not in `data`."""
        try:
            args = [data[k] for k in self.input_keys]
            value = self.fn(torch.cat(args, dim=-1)) if self._concatenates else self.fn(*args)
        except Exception as error:
            explain(error, str(self), self.input_keys, data)
            raise
        if isinstance(value, Tensor) and len(self.output_keys) == 1:
            return {self.output_keys[0]: value}
        if isinstance(value, tuple | list) and len(value) == len(self.output_keys):
            return dict(zip(self.output_keys, value, strict=True))
        found = f"{len(value)} values" if isinstance(value, tuple | list) else f"one {type(value).__name__}"
        raise TypeError(
            f"{self} returned {found}; expected {len(self.output_keys)} for the keys {self.output_keys}: "
            + ("a tensor." if len(self.output_keys) == 1 else "a tuple of tensors.")
        )

    def __str__(self) -> str:
        return f"node {self.name!r}"

    def __repr__(self) -> str:
        return f"Node {self.name}({', '.join(self.input_keys)}) -> {', '.join(self.output_keys)}"


_PLAIN = inspect.Parameter.POSITIONAL_OR_KEYWORD


class Rollout(nn.Module):
    """A closed loop: the nodes in turn, `steps` times, each reading entry t of its inputs and appending its outputs.

    Tensors are (batch, time, features), as in NeuroMANCER's System. A key the nodes write starts from the entries in
    the data, if there are any: a state given with one entry ends with steps + 1, a control that is not given with
    `steps`. A key they only read needs `steps` entries, or is (batch, features) and constant in time. The nodes see
    (batch, features). `steps` may be changed between epochs.

    Raises KeyError for a key that is not there, ValueError for a signal that is too short.
    """

    def __init__(self, nodes: Iterable[nn.Module], steps: int, name: str | None = None) -> None:
        super().__init__()
        self.nodes = nn.ModuleList(_node_list(nodes, "Rollout"))
        self.name, self.steps = name or "rollout", steps
        written: list[str] = []
        initial: list[str] = []  # read in the first step before anything was written to them
        for node in self.nodes:
            initial += [k for k in _inputs(node) if k not in written and k not in initial]
            written += [k for k in _outputs(node) if k not in written]
        self.input_keys, self.output_keys = initial, written
        if duplicates := _duplicates(n.name for n in self.nodes):
            raise ValueError(f"{self} has several nodes named {duplicates[0]!r}; give each its own name.")
        _check_steps(self)

    def forward(self, data: Batch) -> dict[str, Tensor]:
        """All written keys, each (batch, time, features), the entries they started from included."""
        _check_steps(self)
        series: dict[str, list[Tensor]] = {k: [] for k in self.output_keys}
        for key in dict.fromkeys([*self.input_keys, *(k for k in self.output_keys if k in data)]):
            series[key] = self._entries(key, data)
        nodes = [(node, _inputs(node), _outputs(node)) for node in self.nodes]
        for t in range(self.steps):
            for node, reads, writes in nodes:
                new = node({k: series[k][t] for k in reads})
                for key in writes:
                    series[key].append(new[key])
        return {k: torch.stack(series[k], dim=1) for k in self.output_keys}  # one copy at the end

    def _entries(self, key: str, data: Batch) -> list[Tensor]:
        try:
            tensor = data[key]
        except KeyError as error:
            explain(error, str(self), [key], data)
            raise
        written = key in self.output_keys
        if tensor.ndim == 2:
            return [tensor] * (1 if written else self.steps)
        if tensor.ndim != 3:
            raise ValueError(
                f"{self}: {key!r} has shape {tuple(tensor.shape)}; expected (batch, time, features), "
                "or (batch, features) for what is constant in time."
            )
        needed = (1 if key in self.input_keys else 0) if written else self.steps
        if tensor.shape[1] < needed:
            raise ValueError(
                f"{self}: {key!r} has {tensor.shape[1]} time entries, {needed} are needed for {self.steps} steps; "
                "give a longer signal or fewer steps."
            )
        return list(tensor.unbind(1))

    def __str__(self) -> str:
        return f"rollout {self.name!r}"

    def __repr__(self) -> str:
        nodes = ", ".join(str(n.name) for n in self.nodes)
        keys = f"({', '.join(self.input_keys)}) -> {', '.join(self.output_keys)}"
        return f"Rollout {self.name}{keys}: {self.steps} steps of {nodes}"


class Problem(nn.Module):
    """Nodes that compute, terms that judge, and a loss that adds the terms up. Called with a batch, returns a dict:

    every node's outputs under their own keys, and as scalars, for the split s (`batch["name"]`, "train" if missing):
    `s_<term>` (its contribution to the loss, weight included), `s_<constraint>_violation` (mean, without weight),
    `s_objective_loss`, `s_penalty_loss` and `s_loss`. What came with the batch is not returned.

    nodes: Node, Rollout, or anything like a NeuroMANCER node (`input_keys`, `output_keys`, dict in, dict out).
    loss: PenaltyLoss (the default), BarrierLoss or AugmentedLagrangian.
    grad_inference: keep autograd on in evaluation, for losses made of derivatives (PINNs).
    Raises ValueError here for names used twice, keys written twice, and a node that reads what only a later one writes;
    KeyError on a batch for a key that nothing provides.
    """

    def __init__(
        self,
        nodes: Iterable[nn.Module],
        objectives: Iterable[Objective] = (),
        constraints: Iterable[Constraint] = (),
        loss: nn.Module | None = None,
        grad_inference: bool = False,
        name: str = "problem",
    ) -> None:
        super().__init__()
        self.name, self.grad_inference = name, grad_inference
        self.nodes = nn.ModuleList(_node_list(nodes, f"Problem {name!r}"))
        self.objectives = nn.ModuleList(_term_list(objectives, Objective, "objective"))
        self.constraints = nn.ModuleList(_term_list(constraints, Constraint, "constraint"))
        if isinstance(loss, type) or (loss is not None and not isinstance(loss, nn.Module)):
            raise TypeError(f"{self}: loss must be an instance such as weft.PenaltyLoss(); got {loss!r}.")
        self.loss = PenaltyLoss() if loss is None else loss
        if not self.terms:
            raise ValueError(f"{self} has nothing to minimise; give at least one objective or constraint.")
        self.inputs = self._check_keys()
        self._check_names()

    @property
    def terms(self) -> dict[str, Term]:
        """The objectives, then the constraints, by name."""
        return {term.name: term for term in cast(Iterable[Term], [*self.objectives, *self.constraints])}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Outputs, terms and losses by key; see the class."""
        split = batch.get("name", "train")
        data = dict(batch)
        out = self._run_nodes(data)
        for key, value in self.loss(data, self.objectives, self.constraints).items():
            out[f"{split}_{key}"] = value
        return out

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """The outputs of the nodes alone; targets, which only terms read, may be missing."""
        return self._run_nodes(dict(batch))

    def _run_nodes(self, data: dict[str, Any]) -> dict[str, Tensor]:
        """The outputs of all nodes, which are also added to `data`."""
        out: dict[str, Tensor] = {}
        for node in self.nodes:
            try:
                new = node(data)
            except KeyError as error:  # weft's nodes tell themselves, others do not
                if not isinstance(error, MissingKeyError):
                    explain(error, f"node {node.name!r}", _inputs(node), data)
                raise
            if len(new) != len(_outputs(node)):  # a NeuroMANCER System also returns its inputs
                new = {k: new[k] for k in _outputs(node)}
            data.update(new)
            out.update(new)
        return out

    def _check_keys(self) -> list[str]:
        """The keys that must come with the data, in the order they are read. Raises for keys written twice or late."""
        writer: dict[str, nn.Module] = {}
        inputs: list[str] = []
        for i, node in enumerate(self.nodes):
            for key in _inputs(node):
                if key in writer or key in inputs:
                    continue
                late = [n for n in self.nodes[i + 1 :] if key in _outputs(n) and key not in _inputs(n)]
                if late:
                    raise ValueError(
                        f"{self}: node {node.name!r} reads {key!r}, which only the later node {late[0].name!r} writes; "
                        "list the nodes in the order in which they run, or make a Rollout of a loop."
                    )
                inputs.append(key)
            for key in _outputs(node):
                if key in writer:
                    raise ValueError(
                        f"{self}: nodes {writer[key].name!r} and {node.name!r} both write {key!r}; rename one output."
                    )
                if key in RESERVED_KEYS:
                    raise ValueError(
                        f"{self}: node {node.name!r} writes {key!r}, which describes the batch; rename it."
                    )
                writer[key] = node
        for term in cast(Iterable[Term], [*self.objectives, *self.constraints]):
            inputs += [k for k in term.keys if k not in writer and k not in inputs]
        return inputs

    def _check_names(self) -> None:
        if duplicates := _duplicates(n.name for n in self.nodes):
            raise ValueError(f"{self} has several nodes named {duplicates[0]!r}; give each its own name.")
        reported = ["objective_loss", "penalty_loss", "loss"]
        for term in cast(Iterable[Term], [*self.objectives, *self.constraints]):
            reported += [term.name] + ([f"{term.name}_violation"] if isinstance(term, Constraint) else [])
        if duplicates := _duplicates(reported):
            raise ValueError(f"{self} would report {duplicates[0]!r} twice; give each term its own name.")
        outputs = {k for n in self.nodes for k in _outputs(n)}
        for name in reported:
            taken = outputs & {name, *(f"{split}_{name}" for split in ("train", "dev", "test"))}
            if taken:
                raise ValueError(f"{self}: {taken.pop()!r} is both a node's output and a reported term; rename one.")

    def describe(self) -> str:
        """A table: which node reads and writes which key, what the terms read, and what the data must bring."""
        rows = [("node", "reads", "writes")]
        rows += [(str(n.name), ", ".join(_inputs(n)) or "-", ", ".join(_outputs(n))) for n in self.nodes]
        terms = [("term", "reads", "weight")]
        for term in self.terms.values():
            kind = f"{term.kind}" + (f" {term.sense}" if isinstance(term, Constraint) else "")
            terms.append((f"{term.name} ({kind})", ", ".join(term.keys) or "-", f"{term.weight.item():g}"))
        loss = f"loss: {type(self.loss).__name__}"
        return "\n".join(
            [
                f"{self}",
                "",
                *_table(rows),
                "",
                *_table(terms),
                "",
                loss,
                f"from the data: {', '.join(self.inputs) or '-'}",
            ]
        )

    def show(self) -> Drawing:
        """The graph of nodes, keys and terms: a picture in a notebook where graphviz is installed, text by `print`."""
        return draw(self)

    def __str__(self) -> str:
        return f"Problem {self.name!r}"

    def __repr__(self) -> str:
        parameters = sum(p.numel() for p in self.parameters())
        nodes = "; ".join(f"{n.name}({', '.join(_inputs(n))}) -> {', '.join(_outputs(n))}" for n in self.nodes)
        terms = ", ".join(self.terms)
        return f"{self}: {nodes or 'no nodes'} | terms {terms} | {type(self.loss).__name__} | {parameters:,} parameters"


def is_neuromancer(problem: nn.Module) -> bool:
    """Whether `problem` has the shape of a NeuroMANCER Problem: nodes, a step, and a loss that holds the terms."""
    loss = getattr(problem, "loss", None)
    return all(hasattr(problem, k) for k in ("nodes", "step")) and all(
        hasattr(loss, k) for k in ("objectives", "constraints")
    )


def term_keys(problem: nn.Module, split: str) -> dict[str, str] | None:
    """Which scalars to report: their name in the history -> their key in the problem's output. None: every scalar.

    In a NeuroMANCER problem a violation is a tensor with an entry for each constraint and row: take its mean.
    """
    keys: dict[str, str] = {}
    if isinstance(problem, Problem):
        for name, term in problem.terms.items():
            keys[name] = name
            if isinstance(term, Constraint):
                keys[f"{name}_violation"] = f"{name}_violation"
    elif is_neuromancer(problem):
        for name, term in _neuromancer_terms(problem).items():
            keys[name] = term.output_keys[0]
            if len(term.output_keys) > 2:  # a constraint: penalty, value, violation
                keys[f"{name}_violation"] = term.output_keys[2]
    else:
        return None
    keys |= {k: k for k in ("objective_loss", "penalty_loss", "loss")}
    return {f"{split}_{name}": f"{split}_{key}" for name, key in keys.items()}


def term_weights(problem: nn.Module) -> dict[str, Tensor | float]:
    """The weight of each term by name, as it is now; empty for a plain module. A weft term's is the live tensor."""
    return {name: term.weight for name, term in _terms(problem).items()}


def set_term_weights(problem: nn.Module, weights: Mapping[str, float | Tensor]) -> None:
    """Set the weights of the named terms, from the next batch on. Raises ValueError for a name that no term has."""
    terms = _terms(problem)
    for name in weights:
        if name not in terms:
            known = f"its terms are {list(terms)}" if terms else "it has no named terms"
            raise ValueError(f"The problem has no term {name!r}: {known}{suggest(name, terms) or '.'}")
    with torch.no_grad():
        for name, value in weights.items():
            if isinstance(terms[name], Term) or isinstance(terms[name].weight, nn.Parameter):
                terms[name].weight.fill_(value)
            else:
                terms[name].weight = value


def needs_grad_in_eval(modules: Iterable[nn.Module]) -> bool:
    """Whether one of a problem's modules asks for autograd in evaluation, by a true `grad_inference`."""
    # not getattr: where there is no such attribute, nn.Module takes 1.4 us a module to say so
    return any(vars(m).get("grad_inference", getattr(type(m), "grad_inference", False)) for m in modules)


def forward_nodes(problem: nn.Module) -> Callable[[Batch], dict[str, Tensor]]:
    """A function of a batch that returns the problem's tensors without its inputs and losses, for prediction."""
    nodes_only = isinstance(problem, Problem) or is_neuromancer(problem)
    function = cast(Callable[..., Any], problem.step if nodes_only else problem)

    def forward(batch: Batch) -> dict[str, Tensor]:
        out = function(dict(batch))
        if not isinstance(out, Mapping):
            raise TypeError(
                f"Prediction needs a problem that returns a dict of tensors; {type(problem).__name__} returned "
                f"{type(out).__name__}. Return a dict, or pass a predict_step."
            )
        return {k: v for k, v in out.items() if _is_prediction(k, v, batch) and (nodes_only or not _is_loss(k))}

    return forward


def _is_prediction(key: str, value: Any, batch: Batch) -> bool:
    """A tensor that did not come with the batch; a node may have put a new one under a key of the batch."""
    return isinstance(value, Tensor) and key not in RESERVED_KEYS and value is not batch.get(key)


def _is_loss(key: str) -> bool:
    return key == "loss" or key.endswith("_loss")


def _terms(problem: nn.Module) -> dict[str, Any]:
    if isinstance(problem, Problem):
        return dict(problem.terms)
    return _neuromancer_terms(problem) if is_neuromancer(problem) else {}


def _neuromancer_terms(problem: Any) -> dict[str, Any]:
    """Its terms by name; `objective_0`, `constraint_0` where a name is used twice or holds a memory address."""
    numbered = [(f"objective_{i}", term) for i, term in enumerate(problem.loss.objectives)]
    numbered += [(f"constraint_{i}", term) for i, term in enumerate(problem.loss.constraints)]
    counts = Counter(term.name for _, term in numbered)
    return {
        fallback if counts[term.name] > 1 or _ADDRESS.search(str(term.name)) else term.name: term
        for fallback, term in numbered
    }


_ADDRESS = re.compile(r"0x[0-9a-f]{6,}|\d{10,}", re.IGNORECASE)  # new in every process: no name for a history


def _keys(keys: Sequence[str], node: Node) -> list[str]:
    keys = [keys] if isinstance(keys, str) else list(keys)
    for key in keys:
        if not isinstance(key, str):
            raise TypeError(f"{node}: keys are texts; got {key!r}.")
    return keys


def _inputs(node: Any) -> list[str]:
    return node.input_keys


def _outputs(node: Any) -> list[str]:
    return node.output_keys


def _duplicates(names: Iterable[Any]) -> list[Any]:
    return [name for name, count in Counter(names).items() if count > 1]


def _node_list(nodes: Any, what: str) -> list[Any]:
    checked = list(nodes) if isinstance(nodes, Iterable) else [nodes]
    for i, node in enumerate(checked):
        is_node = isinstance(node, nn.Module) and hasattr(node, "input_keys") and hasattr(node, "output_keys")
        if not is_node:
            raise TypeError(f"{what}: {node!r} is no node; wrap it: weft.Node(fn, inputs=[...], outputs=[...]).")
        if getattr(node, "name", None) is None:
            cast(Any, node).name = f"node_{i}"  # as NeuroMANCER does
    return checked


def _term_list(terms: Any, kind: type[Term], word: str) -> list[Any]:
    terms = list(terms) if isinstance(terms, Iterable) else [terms]
    for i, term in enumerate(terms):
        if not isinstance(term, kind):
            make = "weft.objective(fn)" if word == "objective" else "weft.less_equal, greater_equal or equal"
            raise TypeError(f"{term!r} is no {word}; make it with {make}.")
        term.name = term.name or f"{word}_{i}"
    return terms


def _check_steps(rollout: Rollout) -> None:
    if not isinstance(rollout.steps, int) or rollout.steps < 1:
        raise ValueError(f"{rollout}: steps must be an int >= 1; got {rollout.steps!r}.")


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
