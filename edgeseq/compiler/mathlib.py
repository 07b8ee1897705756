"""Transcendentals as polynomials in TIR, so that a vector stays a vector and no libm call is left.

Each replaces the TIR intrinsic of the same name on float32 of any lane count. Worst relative error, measured in
tests/compiler/test_mathlib.py over the stated range: exp 2.5e-7 on [-87, 88], exp2 and log 2.5e-7, tanh and sigmoid
4e-7, erf 5e-7; sin and cos 1e-6 absolute for |x| < 8192. Coefficients: Moshier, Cephes single precision (public
domain).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import factorial
from typing import Any

from .tvm_api import PrimFunc, T, TvmCall, TvmTarget, get_global_func, structural_map, tirx, tvm

Expr = Any


def _lanes(x: Expr) -> int:
    return int(tvm.DataType(_dtype(x)).lanes)


def _dtype(x: Expr) -> str:
    return str(x.ty.dtype) if hasattr(x.ty, "dtype") else str(x.ty)


def _splat(value: float | int, x: Expr, dtype: str = "float32") -> Expr:
    scalar = tirx.const(value, dtype)
    n = _lanes(x)
    return scalar if n == 1 else T.broadcast(scalar, n)


def _typed(dtype: str, x: Expr) -> str:
    n = _lanes(x)
    return dtype if n == 1 else f"{dtype}x{n}"


class _Bindings:
    """Statements to place before the one under rewriting: an expression tree is evaluated at every use, a name once."""

    def __init__(self) -> None:
        self.pending: list[Any] = []

    def let(self, value: Expr, body: Callable[[Expr], Expr]) -> Expr:
        """`body` of a register that holds `value`. TVM would substitute a bound variable by its value in every later
        binding, which doubles with each link of a chain; it does not look into memory, and LLVM keeps it in a register.
        """
        lanes = _lanes(value)
        register = tirx.decl_buffer((lanes,), _dtype(value).split("x")[0], scope="local")
        at = [tirx.const(0, "int32") if lanes == 1 else T.ramp(tirx.const(0, "int32"), 1, lanes)]
        self.pending += [tirx.AllocBuffer(register), tirx.BufferStore(register, value, at)]
        return body(tirx.BufferLoad(register, at))

    def flush(self, stmt: Any) -> Any:
        """`stmt` behind everything it needs."""
        pending, self.pending = self.pending, []
        return tirx.SeqStmt([*pending, stmt]) if pending else stmt


_bindings = _Bindings()
_let = _bindings.let


def _fma(a: Expr, b: Expr, c: Expr) -> Expr:
    return T.call_llvm_pure_intrin(_dtype(a), "llvm.fmuladd", a, b, c)


def _floor(x: Expr) -> Expr:
    return T.call_llvm_pure_intrin(_dtype(x), "llvm.floor", x)


def _rint(x: Expr) -> Expr:
    return T.call_llvm_pure_intrin(_dtype(x), "llvm.rint", x)


def _horner(x: Expr, coefficients: list[float]) -> Expr:
    acc = _splat(coefficients[0], x)
    for c in coefficients[1:]:
        acc = _fma(acc, x, _splat(c, x))
    return acc


def _exp_rest(x: Expr, n: Expr) -> Expr:
    """e^(x - n ln 2), the exponent at most ln(2)/2 in size."""

    def near(r: Expr) -> Expr:
        p = _horner(r, [1.9875691e-4, 1.3981999e-3, 8.3334519e-3, 4.1665796e-2, 1.6666666e-1, 0.5])
        return _fma(p, r * r, r) + _splat(1.0, r)

    return _let(_fma(n, _splat(2.12194440e-4, x), _fma(n, _splat(-0.693359375, x), x)), near)


def exp(x: Expr) -> Expr:
    """2^n * p(r) with n = floor(x log2(e) + 1/2), |r| <= ln(2)/2; 0 below -87.3, infinity above 88.37."""

    def scaled(a: Expr, n: Expr) -> Expr:
        bits = (T.Cast(_typed("int32", a), n) + _splat(127, a, "int32")) << _splat(23, a, "int32")
        value = _exp_rest(a, n) * T.reinterpret(_typed("float32", a), bits)
        value = tirx.Select(a > _splat(88.37, a), _splat(float("inf"), a), value)
        return tirx.Select(a < _splat(-87.3, a), _splat(0.0, a), value)

    return _let(x, lambda a: _let(_floor(a * _splat(1.44269504, a) + _splat(0.5, a)), lambda n: scaled(a, n)))


# 2^r by Taylor, |r| <= 1/2: a decay near 1 is applied a thousand times, so its error must vanish with r
_EXP2 = [0.6931471805599453**i / factorial(i) for i in range(6, -1, -1)]


def exp2(x: Expr) -> Expr:
    """2^n 2^r with n = rint(x), |r| <= 1/2; x is clamped to [-126, 127.5]."""

    def scaled(a: Expr, n: Expr) -> Expr:
        p = _horner(a - n, _EXP2)
        bits = (T.Cast(_typed("int32", a), n) + _splat(127, a, "int32")) << _splat(23, a, "int32")
        return p * T.reinterpret(_typed("float32", a), bits)

    def clamped(a: Expr) -> Expr:
        low = tirx.Select(a < _splat(-126.0, a), _splat(-126.0, a), a)
        high = tirx.Select(low > _splat(127.5, a), _splat(127.5, a), low)
        return _let(high, lambda h: _let(_rint(h), lambda n: scaled(h, n)))

    return _let(x, clamped)


def _scalef(x: Expr, n: Expr) -> Expr:
    """x 2^n of 16 lanes, also where 2^n alone would be out of range."""
    every, current = tirx.const(-1, "int16"), tirx.const(4, "int32")
    return T.call_llvm_pure_intrin(_dtype(x), "llvm.x86.avx512.mask.scalef.ps.512", x, n, x, every, current)


def _nearest(x: Expr, body: Callable[[Expr], Expr]) -> Expr:
    """`body` of the integer nearest to x, |x| < 2^22: x + 1.5 2^23 has no digits behind the point. Two additions, which
    run beside multiplications, where vrndscaleps and vreduceps take up to three cycles."""
    shift = _splat(12582912.0, x)
    return _let(x + shift, lambda t: _let(t - shift, body))


def exp_avx512(x: Expr) -> Expr:
    """The same of x in [-104, 89]: the scaling ends in 0 or infinity by itself, the latter from 88.73 on."""

    def clamped(a: Expr) -> Expr:
        low = tirx.Select(a < _splat(-87.3, a), _splat(-104.0, a), a)
        return tirx.Select(a > _splat(89.0, a), _splat(89.0, a), low)

    def scaled(a: Expr) -> Expr:
        return _nearest(a * _splat(1.44269504, a), lambda n: _scalef(_exp_rest(a, n), n))

    return _let(x, lambda a: _let(clamped(a), scaled))


def exp2_avx512(x: Expr) -> Expr:
    """The same with the scaling of AVX-512, x below infinity; clamped to -126 below, infinity from 128 on."""

    def scaled(a: Expr) -> Expr:
        return _nearest(a, lambda n: _scalef(_horner(a - n, _EXP2), n))

    return _let(x, lambda a: _let(tirx.Select(a < _splat(-126.0, a), _splat(-126.0, a), a), scaled))


def log(x: Expr) -> Expr:
    """Exponent plus a polynomial in m - 1, m in [sqrt(1/2), sqrt(2)); -infinity at 0, NaN below.

    Of subnormal x the result is between -88.1 and -87.3, or, where the CPU counts them as zero, -infinity.
    """

    def split(bits: Expr) -> Expr:
        # Shift the mantissa range to [sqrt(1/2), sqrt(2)) by adding its complement before taking the exponent.
        shifted = bits + _splat(0x3F800000 - 0x3F3504F3, x, "int32")
        e = (shifted >> _splat(23, x, "int32")) - _splat(127, x, "int32")
        mantissa = (shifted & _splat(0x007FFFFF, x, "int32")) + _splat(0x3F3504F3, x, "int32")
        m = T.reinterpret(_typed("float32", x), mantissa) - _splat(1.0, x)
        return _let(T.Cast(_typed("float32", x), e), lambda ef: _let(m, lambda mv: poly(ef, mv)))

    def poly(e: Expr, m: Expr) -> Expr:
        p = _horner(
            m,
            [
                7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
                -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
            ],
        )  # fmt: skip
        z = m * m
        y = p * m * z - e * _splat(2.12194440e-4, m) - z * _splat(0.5, m)
        return m + y + e * _splat(0.693359375, m)

    def whole(a: Expr) -> Expr:
        inf, zero = _splat(float("inf"), a), _splat(0.0, a)
        edge = tirx.Select(a.equal(zero), zero - inf, _splat(float("nan"), a))
        finite = tirx.Select(a.equal(inf), inf, _let(T.reinterpret(_typed("int32", a), a), split))
        return tirx.Select(a > zero, finite, edge)

    return _let(x, whole)


def log1p(x: Expr) -> Expr:
    """log(1 + x), x > -1, exact for tiny x by Kahan's correction: log(u) * x / (u - 1), u = fl(1 + x)."""

    def corrected(a: Expr, u: Expr) -> Expr:
        one = _splat(1.0, a)
        ratio = tirx.Select(u.equal(a), one, a / tirx.Select(u.equal(one), one, u - one))
        return tirx.Select(u.equal(one), a, log(u) * ratio)

    return _let(x, lambda a: _let(a + _splat(1.0, a), lambda u: corrected(a, u)))


def sigmoid(x: Expr) -> Expr:
    return _splat(1.0, x) / (_splat(1.0, x) + exp(_splat(0.0, x) - x))


def tanh(x: Expr) -> Expr:
    """Odd polynomial below 0.625, 1 - 2/(exp(2|x|) + 1) above."""

    def both(a: Expr) -> Expr:
        z = a * a
        near = _let(
            z,
            lambda zv: _horner(
                zv, [-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1]
            )
            * zv
            * a
            + a,
        )  # fmt: skip
        mag = tirx.Select(a < _splat(0.0, a), _splat(0.0, a) - a, a)
        far = _let(
            exp(mag + mag), lambda e: _splat(1.0, a) - _splat(2.0, a) / (e + _splat(1.0, a))
        )  # fmt: skip
        signed = _let(far, lambda f: tirx.Select(a < _splat(0.0, a), _splat(0.0, a) - f, f))
        return tirx.Select(mag < _splat(0.625, a), near, signed)

    return _let(x, both)


def erf(x: Expr) -> Expr:
    """Maclaurin-type odd polynomial below 1, 1 - exp(-x^2) p(t) above (Abramowitz and Stegun 7.1.26)."""

    def both(a: Expr) -> Expr:
        z = a * a
        near = _let(
            z,
            lambda zv: a
            * _horner(
                zv,
                [
                    7.853861353153693e-5, -8.010193625184903e-4, 5.188327685732524e-3, -2.685381193529856e-2,
                    1.128358514861418e-1, -3.761262582423300e-1, 1.128379165726710e0,
                ],
            ),
        )  # fmt: skip
        mag = tirx.Select(a < _splat(0.0, a), _splat(0.0, a) - a, a)
        t = _splat(1.0, a) / (_splat(1.0, a) + _splat(0.3275911, a) * mag)
        far = _let(
            t,
            lambda tv: _splat(1.0, a)
            - tv
            * _horner(tv, [1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592])
            * exp(_splat(0.0, a) - a * a),
        )  # fmt: skip
        signed = _let(far, lambda f: tirx.Select(a < _splat(0.0, a), _splat(0.0, a) - f, f))
        return tirx.Select(mag < _splat(1.0, a), near, signed)

    return _let(x, both)


def _sincos(x: Expr, shift: int) -> Expr:
    """sin(x + shift pi/2) by reduction to |r| <= pi/4 and the quadrant."""

    def quadrant(a: Expr, n: Expr) -> Expr:
        r = a - n * _splat(1.5703125, a) - n * _splat(4.837512969970703125e-4, a) - n * _splat(7.54978995489e-8, a)
        q = T.Cast(_typed("int32", a), n) + _splat(shift, a, "int32")
        return _let(r, lambda rv: _let(q, lambda qv: pick(rv, qv)))

    def pick(r: Expr, q: Expr) -> Expr:
        z = r * r
        s = _horner(z, [-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1]) * z * r + r
        c = _horner(z, [2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2]) * z * z
        c = c - z * _splat(0.5, r) + _splat(1.0, r)
        one, two = _splat(1, r, "int32"), _splat(2, r, "int32")
        value = tirx.Select((q & one).equal(one), c, s)
        return _let(value, lambda v: tirx.Select((q & two).equal(two), _splat(0.0, r) - v, v))

    return _let(x, lambda a: _let(_floor(a * _splat(0.63661977, a) + _splat(0.5, a)), lambda n: quadrant(a, n)))


def sin(x: Expr) -> Expr:
    return _sincos(x, 0)


def cos(x: Expr) -> Expr:
    return _sincos(x, 1)


def rsqrt(x: Expr) -> Expr:
    return _splat(1.0, x) / T.call_llvm_pure_intrin(_dtype(x), "llvm.sqrt", x)


_POLYNOMIALS = {f.__name__: f for f in (exp, exp2, log, log1p, sigmoid, tanh, erf, sin, cos, rsqrt)}
_AVX512 = {"exp": exp_avx512, "exp2": exp2_avx512}
_MARK = "edgeseq_math_"


def mark(func: PrimFunc) -> PrimFunc:
    """Hide every float32 transcendental behind an opaque call, so that LowerIntrin leaves it alone."""

    def replace(call: TvmCall) -> Expr:
        name = str(getattr(call.op, "name", "")).removeprefix("tirx.")
        if name in _POLYNOMIALS and _dtype(call).startswith("float32"):
            return T.call_pure_extern(_dtype(call), _MARK + name, call.args[0])
        return call

    return func.with_body(structural_map(func.body, [(TvmCall, replace)]))


def _marked(call: TvmCall) -> str | None:
    """The transcendental behind an opaque call, or None."""
    if getattr(call.op, "name", "") != "tirx.call_pure_extern":
        return None
    name = str(getattr(call.args[0], "value", ""))
    return name.removeprefix(_MARK) if name.startswith(_MARK) else None


def _guard(call: TvmCall) -> Expr:
    """Arguments leave their conditional when they are named, so they take its condition with them."""
    if getattr(call.op, "name", "") != "tirx.if_then_else":
        return call
    condition, yes, no = call.args

    def guarded(test: Expr) -> Callable[[TvmCall], Expr]:
        def wrap(inner: TvmCall) -> Expr:
            if _marked(inner) is None:
                return inner
            argument = tirx.if_then_else(test, inner.args[1], _splat(1.0, inner))
            return T.call_pure_extern(_dtype(inner), inner.args[0].value, argument)

        return wrap

    yes = structural_map(yes, [(TvmCall, guarded(condition))])
    no = structural_map(no, [(TvmCall, guarded(tirx.Not(condition)))])
    return tirx.if_then_else(condition, yes, no)


def expand(func: PrimFunc) -> PrimFunc:
    """Put the polynomials where `mark` left its calls. Runs last: TVM's analyses refuse nested lets."""
    body = structural_map(func.body, [(TvmCall, _guard)])
    wide = _has_avx512(func.attrs["target"])

    def replace(call: TvmCall) -> Expr:
        name = _marked(call)
        if not name:
            return call
        polynomial = _AVX512.get(name) if wide and _lanes(call) == 16 else None
        return (polynomial or _POLYNOMIALS[name])(call.args[1])

    body = structural_map(body, [(TvmCall, replace), (tirx.BufferStore, _bindings.flush), (tirx.Bind, _bindings.flush)])
    return func.with_body(body)


@cache
def _has_avx512(target: TvmTarget) -> bool:
    if not str(target.attrs.get("mtriple", "")).startswith("x86_64"):
        return False
    return {"avx512f", "avx512dq"} <= set(map(str, get_global_func("target.llvm_get_cpu_features")(target)))
