"""The polynomials against numpy in float64: relative error over the range, and what infinities and NaN become."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeseq.compiler import lower
from edgeseq.compiler.codegen import KernelSet
from edgeseq.compiler.ir import KernelRef
from edgeseq.compiler.kernels._emit import kernel, load, store
from edgeseq.compiler.kernels.selective_scan import SelectiveScan
from edgeseq.compiler.mathlib import _POLYNOMIALS
from edgeseq.compiler.targets import resolve
from edgeseq.compiler.tvm_api import T, TvmTarget

from .library import Guarded, link_shared, unset

N = 1 << 15
INF, NAN = math.inf, math.nan


@dataclass(frozen=True)
class Case:
    """`worst` error allowed over [low, high], relative to max(|want|, floor); `special` are exact results."""

    low: float
    high: float
    worst: float
    floor: float = 0.0
    logarithmic: bool = False
    special: tuple[tuple[float, float], ...] = ()


CASES = {
    "exp": Case(-87, 88, 2.5e-7, special=((-INF, 0), (-1e30, 0), (-90, 0), (0, 1), (INF, INF), (90, INF), (1e30, INF))),
    "exp2": Case(-126, 127.4, 2.5e-7, special=((0, 1), (1, 2), (-1, 0.5), (-INF, 2.0**-126), (-1e30, 2.0**-126))),
    "log": Case(1.2e-38, 3e38, 2.5e-7, 1e-2, True, ((0, -INF), (1, 0), (INF, INF), (-1, NAN), (-INF, NAN))),
    "log1p": Case(1e-30, 1e38, 4e-7, 0, True, ((0, 0), (-1, -INF), (INF, INF), (-2, NAN), (1e-38, 1e-38))),
    "sigmoid": Case(-87, 100, 4e-7, special=((0, 0.5), (INF, 1), (-INF, 0), (1e30, 1), (-1e30, 0))),
    "tanh": Case(-20, 20, 4e-7, special=((0, 0), (INF, 1), (-INF, -1), (1e30, 1), (-1e30, -1))),
    "erf": Case(-6, 6, 5e-7, special=((0, 0), (INF, 1), (-INF, -1), (1e30, 1))),
    "sin": Case(-8192, 8192, 1e-6, 1.0, special=((0, 0), (INF, NAN), (-INF, NAN))),
    "cos": Case(-8192, 8192, 1e-6, 1.0, special=((0, 1), (INF, NAN), (-INF, NAN))),
    "rsqrt": Case(1e-37, 1e37, 2e-7, 0, True, ((0, INF), (1, 1), (4, 0.5), (INF, 0), (-1, NAN))),
}


def definition(name: str, x: NDArray) -> NDArray:
    x = x.astype(np.float64)
    with np.errstate(all="ignore"):
        if name == "sigmoid":
            return np.where(x < 0, np.exp(x) / (1 + np.exp(x)), 1 / (1 + np.exp(-x)))
        if name == "erf":
            return np.array([math.erf(v) for v in x])
        if name == "rsqrt":
            return 1 / np.sqrt(x)
        return getattr(np, name)(x)


class Functions:
    """Each polynomial on N values, 16 lanes at a time or one."""

    def __init__(self, folder: Path) -> None:
        target = TvmTarget(resolve("host").llvm)
        funcs = []
        for name in CASES:
            for lanes in (1, 16):
                with (
                    kernel(f"{name}_{lanes}", [("x", "float32", N), ("y", "float32", N)]) as k,
                    T.serial(N // lanes) as i,
                ):
                    store(k["y"], i * lanes, getattr(T, name)(load(k["x"], i * lanes, lanes)), lanes)
                funcs.append(lower.lower(k.func, target))
        lower.emit_object(funcs, target, folder / "math.o", folder / "math.s")
        self.assembly = (folder / "math.s").read_text()
        self.native = ctypes.CDLL(str(link_shared(folder / "math.o", folder / "math.so")))

    def __call__(self, name: str, lanes: int, values: NDArray) -> NDArray:
        x = Guarded(np.resize(values.astype(np.float32), N))
        y = Guarded(unset(N))
        getattr(self.native, f"{name}_{lanes}")(
            ctypes.c_void_p(x.array.ctypes.data), ctypes.c_void_p(y.array.ctypes.data), ctypes.c_int32(0)
        )
        y.check()
        return y.array[: len(values)]


@pytest.fixture(scope="module")
def functions(tmp_path_factory: pytest.TempPathFactory) -> Functions:
    return Functions(tmp_path_factory.mktemp("math"))


def spread(case: Case) -> NDArray:
    """Values over the range, even or in equal ratios, with its ends."""
    if case.logarithmic:
        return np.geomspace(case.low, case.high, N).astype(np.float32)
    return np.linspace(case.low, case.high, N).astype(np.float32)


def test_every_polynomial_has_a_case() -> None:
    assert set(CASES) == set(_POLYNOMIALS)


@pytest.mark.parametrize("lanes", [1, 16])
@pytest.mark.parametrize("name", CASES)
def test_error_over_the_range(functions: Functions, name: str, lanes: int) -> None:
    case = CASES[name]
    for x in (spread(case), np.linspace(max(case.low, -1.5), min(case.high, 1.5), N).astype(np.float32)):
        want = definition(name, x)
        scale = np.maximum(np.abs(want), max(case.floor, 1e-37))
        error = np.abs(functions(name, lanes, x) - want) / scale
        worst = int(np.argmax(error))
        assert error[worst] <= case.worst, f"{name}({x[worst]!r}) is off by {error[worst]:.3g}"


@pytest.mark.parametrize("lanes", [1, 16])
@pytest.mark.parametrize("name", CASES)
def test_special_values(functions: Functions, name: str, lanes: int) -> None:
    pairs = [*CASES[name].special, (NAN, NAN)]
    got = functions(name, lanes, np.array([x for x, _ in pairs]))
    np.testing.assert_array_equal(
        got, np.array([y for _, y in pairs], np.float32), f"{name} of {[x for x, _ in pairs]}"
    )


def test_an_edge_between_underflow_and_overflow(functions: Functions) -> None:
    """exp is monotonic where its branches meet."""
    for low, high in ((-88, -86), (87.5, 89)):
        y = functions("exp", 16, np.linspace(low, high, N))
        assert (y[1:] >= y[:-1]).all()


def test_no_library_call_is_left(functions: Functions) -> None:
    for name in ("expf", "logf", "log1pf", "tanhf", "erff", "sinf", "cosf"):
        assert name not in functions.assembly


@pytest.mark.parametrize("profile", ["host", "raspberry-pi-5"])
def test_the_code_of_a_scan(profile: str, tmp_path: Path) -> None:
    """AVX-512 scales by powers of two itself, and no frame with spilled vectors of 64 bytes lies across cache lines."""
    target = resolve(profile)
    kernels = KernelSet(target)
    p = SelectiveScan(8, 64, 16, 64, 64, 32, 32, 64, gate=True, quant=8)
    kernels.add(KernelRef("selective_scan", p), len(p.args))
    kernels.write_object(tmp_path / "k.o", tmp_path / "k.s")
    code = (tmp_path / "k.s").read_text()
    wide = {"avx512f", "avx512dq"} <= set(target.features)
    assert ("vscalefps" in code) == wide
    assert not wide or "andq\t$-64, %rsp" in code
