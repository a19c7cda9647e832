"""Compiled code is loaded only from where nobody else can have put it."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import weft
from weft.compile import cache as caches
from weft.compile.graph import compile_graph, trace


def fitted_in_cache(x: torch.Tensor) -> Any:
    graph, constants = trace(lambda x: (x.sin() + 3.25,), [x])
    return compile_graph(graph, [x, *constants], 1)([x])[0]


def test_a_package_that_others_can_write_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", os.environ.get("WEFT_TEST_TORCH", str(tmp_path / "torch")))
    x = torch.rand(5)
    assert torch.equal(fitted_in_cache(x), x.sin() + 3.25)
    (package,) = (tmp_path / "cache").glob("*.so")
    assert caches.is_private(package) and caches.is_private(package.parent) and caches.is_private(tmp_path / "torch")
    before = package.stat().st_mtime_ns
    assert torch.equal(fitted_in_cache(x), x.sin() + 3.25)
    package.write_bytes(b"planted")
    package.chmod(0o666)
    assert torch.equal(fitted_in_cache(x), x.sin() + 3.25)  # not loaded
    assert caches.is_private(package) and package.read_bytes() != b"planted" and package.stat().st_mtime_ns > before
    package.parent.chmod(0o777)
    with pytest.warns(
        UserWarning, match="not loaded from .*cache, which is another user's or can be written by others"
    ):
        folder = caches.cache_folder()
    assert folder != package.parent and caches.is_private(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert caches.cache_folder() == folder  # told once, and kept for this process


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "theirs").mkdir(mode=0o755)
    os.chown(tmp_path / "theirs", 65534, 65534)
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path / "theirs"))
    with pytest.warns(UserWarning, match="another user's"):
        assert caches.cache_folder() != tmp_path / "theirs"


def test_torchs_own_cache_is_below_that_of_weft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    with caches.torchs_cache():
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "cache/torch")
        assert caches.is_private(tmp_path / "cache/torch")
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    assert weft.__version__
