"""A cluster for the tests of this room, and the working folder of somebody who submits."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import weft
from tests.helpers import cluster as one_node


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[one_node.Cluster]:
    if missing := one_node.missing_programs():
        pytest.skip(f"needs SLURM: {missing}")
    made = one_node.Cluster(tmp_path_factory.mktemp("s"))
    made.start()
    yield made
    made.stop()


@pytest.fixture
def project(tmp_path: Path, cluster: one_node.Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a config, and the cluster's commands at hand."""
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    places = [str(Path(weft.__file__).parents[1]), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, places)))
    (tmp_path / "module.py").write_text(textwrap.dedent(one_node.MODULE))
    one_node.write_config(tmp_path)
    yield tmp_path
    cluster.call("scontrol", "update", "PartitionName=main", "GraceTime=0")
    cluster.call("scancel", "--user", str(os.getuid()), check=False)
