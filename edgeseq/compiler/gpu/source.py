"""GPU kernels to program text: TVM's code for each kernel behind a preamble of the few functions that differ.

OpenCL: every pointer becomes a buffer and a byte offset, so that arguments may begin anywhere in a block of memory.
"""

from __future__ import annotations

import re

from ..tvm_api import IRModule, PrimFunc, TvmTarget, get_global_func

_LIBM = (
    "acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "cos", "cosh", "erf", "exp", "exp10", "exp2", "expm1",
    "fmod", "hypot", "log", "log10", "log1p", "log2", "pow", "sin", "sinh", "sqrt", "tan", "tanh", "fabs", "floor",
    "ceil", "trunc", "round",
)  # fmt: skip
"""C's names end in f, OpenCL's do not."""

OPENCL = (
    "".join(f"#define {name}f {name}\n" for name in _LIBM)
    + """\
#define nearbyintf rint
#define es_sync_memory() barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE)
inline float es_half(uint h)
{ /* exact for every finite number and infinity; a device that flushes denormals loses those below 2^-14 */
    uint rest = (h & 0x7fffu) << 13;
    float f = as_float(rest) * as_float(0x77800000u); /* 2^112 */
    return as_float(as_uint(rest >= 0x0f800000u ? as_float(rest | 0x7f800000u) : f) | (h & 0x8000u) << 16);
}
inline int es_dp4a(int a, int b, int c)
{
    char4 x = as_char4(a), y = as_char4(b);
    return c + x.x * y.x + x.y * y.y + x.z * y.z + x.w * y.w;
}
inline int es_rint(float x) { return convert_int_rte(x); }
#define es_await()
"""
)

CUDA = """\
typedef unsigned int uint;
typedef unsigned char uchar;
typedef unsigned short ushort;
#ifndef __CUDACC_RTC__
#include <stdint.h>
#else
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#endif
static __device__ __forceinline__ float es_half(uint h)
{
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"((ushort)h));
    return f;
}
static __device__ __forceinline__ int es_dp4a(int a, int b, int c) { return __dp4a(a, b, c); }
static __device__ __forceinline__ void es_sync_memory() { __syncthreads(); }
static __device__ __forceinline__ int es_rint(float x) { return __float2int_rn(x); }
static __device__ __forceinline__ void es_await(void)
{ /* let the next launch begin, then wait for the one before: each kernel does both, so order stays */
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
static __device__ __forceinline__ float es_shuffle(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
static __device__ __forceinline__ int es_shuffle(int x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
"""


def program(funcs: list[PrimFunc], backend: str, target: TvmTarget) -> str:
    """One program text with every kernel of `funcs` (lowered) as an entry of its name."""
    build = get_global_func(f"target.build.{backend}")
    parts = [OPENCL if backend == "opencl" else CUDA]
    for func in funcs:
        name = str(func.attrs["global_symbol"])
        text = str(build(IRModule({name: func}), target).inspect_source())
        parts.append(_opencl(text, name) if backend == "opencl" else _cuda(text))
    return "\n".join(parts)


def _cuda(text: str) -> str:
    """Without TVM's preamble, which includes headers that NVRTC alone does not have.

    And without __restrict__: it would allow to read ahead of es_await, as from memory that nobody writes.
    """
    start = text.index('extern "C" __global__')
    return _without_declaration(text[start:]).replace(" __restrict__", "")


def _opencl(text: str, name: str) -> str:
    text = _without_declaration(text[text.index(f"__kernel void {name}(") :])
    head, _, body = text.partition("{\n")
    params = re.search(r"\((.*)\)", head, re.S)
    assert params is not None
    types: list[tuple[str, str]] = []
    for item in params[1].split(","):
        declared, _, own = item.strip().rpartition(" ")
        types.append((declared, own))
    pairs = ", ".join(f"__global char* {n}_p, ulong {n}_o" for _, n in types)
    opened = "".join(f"  {t} {n} = ({t.replace(' restrict', '')})({n}_p + {n}_o);\n" for t, n in types)
    return f"__kernel void {name}({pairs}) {{\n{opened}{body}"


def _without_declaration(text: str) -> str:
    """TVM writes each kernel's declaration on a line before its definition."""
    first, _, rest = text.partition("\n")
    return rest if first.rstrip().endswith(";") else text
