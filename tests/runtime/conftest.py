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


@pytest.fixture(params=[1, 2, 3])
def model(handmade_bundle: Path, request: pytest.FixtureRequest) -> Iterator[Model]:
    """Open with 1, 2 and 3 threads (more than the cores of a small machine), scratch poisoned."""
    with edgeseq.load(handmade_bundle, threads=request.param, poison=True) as opened:
        yield opened
