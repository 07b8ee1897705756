from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from exporters import export
from tests.exporters.support import source


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """exported(family, flavour="onnx", dtype="fp32") -> export directory, made once."""
    made: dict[tuple[str, str, str], Path] = {}

    def make(family: str, flavour: str = "onnx", dtype: str = "fp32") -> Path:
        key = (family, flavour, dtype)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("export") / family
            chunks = (3, 8) if (flavour, dtype) == ("onnx", "fp32") else (8,)  # tracing is what takes the time
            export(source(family), made[key], flavour=flavour, dtype=dtype, chunks=chunks, context=64)
        return made[key]

    return make
