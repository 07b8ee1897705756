"""What every test may rely on: numbers do not depend on how many workers run, and nothing waits for a keyboard."""

from __future__ import annotations

import os
import random

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Several workers share the cores: one thread each for the libraries that would take all. PoCL compiles without
    optimising: that takes minutes for a large kernel, which then runs for milliseconds."""
    os.environ.setdefault("POCL_EXTRA_BUILD_FLAGS", "-cl-opt-disable")
    if hasattr(config, "workerinput"):
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ.setdefault(name, "1")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Tests seed their own generators; this catches one that forgot."""
    random.seed(0)
