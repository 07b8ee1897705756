"""The hand-made bundle, built once per session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import edgeseq
from edgeseq.runtime import Model

from . import build


@pytest.fixture(scope="session")
def handmade_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build.bundle(tmp_path_factory.mktemp("handmade") / "bundle")


@pytest.fixture(scope="session")
def opencl_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hand-made bundle for OpenCL; skips where there is no device."""
    if build.opencl_missing():
        pytest.skip(build.opencl_missing())
    return build.gpu_bundle(tmp_path_factory.mktemp("opencl") / "bundle")


@pytest.fixture(params=[1, 2, 3, "opencl"])
def model(request: pytest.FixtureRequest) -> Iterator[Model]:
    """Open with 1, 2 and 3 threads (more than the cores of a small machine) and on OpenCL, scratch poisoned."""
    gpu = request.param == "opencl"
    bundle = request.getfixturevalue("opencl_bundle" if gpu else "handmade_bundle")
    with edgeseq.load(bundle, threads=None if gpu else request.param, poison=True) as opened:
        yield opened
