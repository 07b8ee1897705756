"""Bundles that a test may damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests import bundles


@pytest.fixture
def mamba(tmp_path: Path) -> Path:
    """A bundle of one's own."""
    out = tmp_path / "mamba"
    shutil.copytree(bundles.bundled("mamba"), out)
    return out
