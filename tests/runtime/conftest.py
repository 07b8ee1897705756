"""The hand-made bundle, built once per session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import edgeseq
from edgeseq.runtime import Model

from . import build, cuda_bundle


@pytest.fixture(scope="session")
def handmade_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build.bundle(tmp_path_factory.mktemp("handmade") / "bundle")


@pytest.fixture(scope="session")
def opencl_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hand-made bundle for OpenCL; skips where there is no device."""
    if build.opencl_missing():
        pytest.skip(build.opencl_missing())
    return build.gpu_bundle(tmp_path_factory.mktemp("opencl") / "bundle")


@pytest.fixture(scope="session")
def fake_cuda(tmp_path_factory: pytest.TempPathFactory) -> cuda_bundle.Fake:
    return cuda_bundle.Fake(cuda_bundle.library(tmp_path_factory.mktemp("cuda") / "libfake.so"))


@pytest.fixture
def fake(fake_cuda: cuda_bundle.Fake, monkeypatch: pytest.MonkeyPatch) -> Iterator[cuda_bundle.Fake]:
    """A CUDA driver over host memory in the place of the real one; afterwards nothing of the test is left on it."""
    monkeypatch.setenv("EDGESEQ_CUDA_LIBRARY", str(fake_cuda.path))
    monkeypatch.delenv("EDGESEQ_CUDA_DEVICE", raising=False)
    fake_cuda.reset()
    yield fake_cuda
    fake_cuda.reset()
    assert fake_cuda.live == 0, f"{fake_cuda.live} things are left on the device"


@pytest.fixture(scope="session")
def cuda_plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hand-made bundle for CUDA, with kernels that the fake driver knows."""
    return cuda_bundle.bundle(tmp_path_factory.mktemp("cuda") / "bundle", cuda_bundle.parts())


@pytest.fixture(params=[1, 2, 3, "opencl", "cuda"])
def model(request: pytest.FixtureRequest) -> Iterator[Model]:
    """Open with 1, 2 and 3 threads (more than the cores of a small machine), on OpenCL, and on CUDA as far as a fake
    driver goes, scratch poisoned."""
    gpu = isinstance(request.param, str)
    if request.param == "cuda":
        request.getfixturevalue("fake")
    fixtures = {"opencl": "opencl_bundle", "cuda": "cuda_plan"}
    bundle = request.getfixturevalue(fixtures.get(request.param, "handmade_bundle"))
    with edgeseq.load(bundle, threads=None if gpu else request.param, poison=True) as opened:
        yield opened
