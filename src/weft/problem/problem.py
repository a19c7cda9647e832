"""The problem: what maps a batch to named outputs and one loss.

    net = weft.Node(mlp, ["a", "p"], ["x"], name="solution")
    problem = weft.Problem([net], objectives=[weft.objective(rosenbrock)], constraints=[weft.less_equal("x", 1.0)])
    problem({"a": a, "p": p, "name": "train"})["train_loss"].backward()
    print(problem.describe())

`weft.problem.reading` reads any problem: weft's, NeuroMANCER's (known by its shape, never imported), a plain module.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from torch import Tensor, nn

from weft.problem.losses import PenaltyLoss
from weft.problem.nodes import duplicates_in, node_list
from weft.problem.terms import (
    RESERVED_KEYS,
    MissingKeyError,
    Objective,
    Term,
    explain,
    weights_of_picked,
    with_parts,
)
from weft.types import Batch


class Problem(nn.Module):
    """Nodes that compute, terms that judge, and a loss that adds the terms up. Called with a batch, returns a dict:

    every node's outputs under their own keys, and as scalars, for the split s (`batch["name"]`, "train" if missing):
    `s_<term>` (its contribution to the loss, weight included), `s_<constraint>_violation` (mean, without weight),
    `s_objective_loss`, `s_penalty_loss` and `s_loss`. What came with the batch is not returned. A term that picks rows
    by a mask counts for those: their number is `s_<term>_weight`, and of the only term there is also `num_examples`.
    Of a batch with parts (`{"interior": {"x": ...}}`) nodes and terms read keys like "interior.x".

    nodes: Node, Rollout, or anything like a NeuroMANCER node (`input_keys`, `output_keys`, dict in, dict out).
    objectives, constraints: the terms. loss: PenaltyLoss (the default), BarrierLoss or AugmentedLagrangian.
    grad_inference: keep autograd on in evaluation, for losses made of derivatives (PINNs).
    Raises ValueError here for names used twice, keys written twice, and a node that reads what only a later one writes;
    KeyError on a batch for a key that nothing provides.
    """

    nodes: Any
    """The nodes, as a ModuleList."""

    def __init__(
        self,
        nodes: Iterable[nn.Module],
        objectives: Iterable[Objective] = (),
        constraints: Iterable[Term] = (),
        loss: nn.Module | None = None,
        grad_inference: bool = False,
        name: str = "problem",
    ) -> None:
        super().__init__()
        self.name, self.grad_inference = name, grad_inference
        self.nodes = nn.ModuleList(node_list(nodes, f"Problem {name!r}"))
        self.objectives = nn.ModuleList(_term_list(objectives, "objective"))
        self.constraints = nn.ModuleList(_term_list(constraints, "constraint"))
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

    def forward(self, batch: Batch) -> dict[str, Any]:
        """Outputs, terms and losses by key; see the class."""
        try:
            split, data = batch.get("name", "train"), with_parts(batch)
        except AttributeError:
            from weft.problem.mistakes import no_keys

            raise no_keys(self, batch) from None
        out = self._run_nodes(data)
        for key, value in self.loss(data, self.objectives, self.constraints).items():
            out[f"{split}_{key}"] = value
        return out | weights_of_picked([*self.objectives, *self.constraints], split)

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """The outputs of the nodes alone; targets, which only terms read, may be missing."""
        return self._run_nodes(with_parts(batch))

    def _run_nodes(self, data: dict[str, Any]) -> dict[str, Tensor]:
        """The outputs of all nodes, which are also added to `data`."""
        out: dict[str, Tensor] = {}
        for node in self.nodes:
            try:
                new = node(data)
            except KeyError as error:  # weft's nodes tell themselves, others do not
                if not isinstance(error, MissingKeyError):
                    explain(error, f"node {node.name!r}", node.input_keys, data)
                raise
            if len(new) != len(node.output_keys):  # a NeuroMANCER System also returns its inputs
                new = {k: new[k] for k in node.output_keys}
            data.update(new)
            out.update(new)
        return out

    def _check_keys(self) -> list[str]:
        """The keys that must come with the data, in the order they are read. Raises for keys written twice or late."""
        writer: dict[str, nn.Module] = {}
        inputs: list[str] = []
        for i, node in enumerate(self.nodes):
            for key in node.input_keys:
                if key in writer or key in inputs:
                    continue
                late = [n for n in self.nodes[i + 1 :] if key in n.output_keys and key not in n.input_keys]
                if late:
                    from weft.problem.mistakes import written_late

                    raise written_late(self, node, key, late[0])
                inputs.append(key)
            for key in node.output_keys:
                if key in writer or key in RESERVED_KEYS:
                    from weft.problem.mistakes import taken_key

                    raise taken_key(self, node, key, writer.get(key))
                writer[key] = node
        for term in cast(Iterable[Term], [*self.objectives, *self.constraints]):
            inputs += [k for k in term.keys if k not in writer and k not in inputs]
        return inputs

    def _check_names(self) -> None:
        if duplicates := duplicates_in(n.name for n in self.nodes):
            from weft.problem.named import tell_apart

            tell_apart(self, duplicates)
        reported = ["objective_loss", "penalty_loss", "loss"]
        for term in cast(Iterable[Term], [*self.objectives, *self.constraints]):
            reported += [term.name] + ([f"{term.name}_violation"] if term.kind == "constraint" else [])
        if duplicates := duplicates_in(reported):
            raise ValueError(f"{self} would report {duplicates[0]!r} twice; give each term its own name.")
        outputs = {k for n in self.nodes for k in n.output_keys}
        for name in reported:
            taken = outputs & {name, *(f"{split}_{name}" for split in ("train", "dev", "test"))}
            if taken:
                raise ValueError(f"{self}: {taken.pop()!r} is both a node's output and a reported term; rename one.")

    def describe(self) -> str:
        """A table: which node reads and writes which key, what the terms read, and what the data must bring."""
        from weft.problem.drawing import table_of

        return table_of(self)

    def show(self) -> Any:
        """The graph of nodes, keys and terms: a picture in a notebook where graphviz is installed, text by `print`."""
        from weft.problem.drawing import draw

        return draw(self)

    def __str__(self) -> str:
        return f"Problem {self.name!r}"

    def __repr__(self) -> str:
        parameters = sum(p.numel() for p in self.parameters())
        nodes = "; ".join(f"{n.name}({', '.join(n.input_keys)}) -> {', '.join(n.output_keys)}" for n in self.nodes)
        terms = ", ".join(self.terms)
        return f"{self}: {nodes or 'no nodes'} | terms {terms} | {type(self.loss).__name__} | {parameters:,} parameters"


def _term_list(terms: Any, word: str) -> list[Any]:
    terms = list(terms) if isinstance(terms, Iterable) else [terms]
    for i, term in enumerate(terms):
        if not isinstance(term, Term) or (term.kind == "constraint") != (word == "constraint"):
            make = "weft.objective(fn)" if word == "objective" else "weft.less_equal, greater_equal or equal"
            raise TypeError(f"{term!r} is no {word}; make it with {make}.")
        term.name = term.name or f"{word}_{i}"
    return terms
