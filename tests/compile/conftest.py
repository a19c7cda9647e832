"""Graphs that cost nothing to make, so that each kind of batch has one; and such that run as they were traced."""

from __future__ import annotations

import pytest

from tests.helpers.graphs import COSTS, make_free, run_as_traced
from weft.compile import choosing


@pytest.fixture(autouse=True)
def free_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every kind of batch that comes again made into a graph, however short the fit is."""
    make_free(monkeypatch)


@pytest.fixture
def true_costs(free_graphs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the costs of graphs decide about them, as in a run of a user's."""
    for name, seconds in COSTS.items():
        monkeypatch.setattr(choosing, name, seconds)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the traced graphs themselves."""
    run_as_traced(monkeypatch)
