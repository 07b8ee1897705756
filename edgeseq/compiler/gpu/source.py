"""GPU kernels to program text: TVM's code for each kernel behind a preamble of the few functions that differ.

OpenCL: every pointer becomes a buffer and a byte offset, so that arguments may begin anywhere in a block of memory.
Half precision is for storage alone: a product in halves would be converted before it is added in float32, so it saves
nothing over converting the weight and one fused multiply-add, and would lose digits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

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
inline int es_dp4a(int a, int b, int c)
{
#if defined(__opencl_c_integer_dot_product_input_4x8bit_packed)
    return c + dot_4x8packed_ss_int(as_uint(a), as_uint(b));
#else
    char4 x = as_char4(a), y = as_char4(b);
    return c + x.x * y.x + x.y * y.y + x.z * y.z + x.w * y.w;
#endif
}
inline int es_rint(float x) { return convert_int_rte(x); }
#define es_await()
"""
)

_HALF_BY_INTEGERS = """\
inline float es_half(uint h)
{ /* exact for every finite number and infinity; a device that flushes denormals loses those below 2^-14 */
    uint rest = (h & 0x7fffu) << 13;
    float f = as_float(rest) * as_float(0x77800000u); /* 2^112 */
    return as_float(as_uint(rest >= 0x0f800000u ? as_float(rest | 0x7f800000u) : f) | (h & 0x8000u) << 16);
}
"""

_HALF = f"""\
#ifdef cl_khr_fp16
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
inline float es_half(uint h) {{ return (float)as_half((ushort)h); }}
#else
{_HALF_BY_INTEGERS}#endif
"""

_SHUFFLE = """\
#if defined(cl_khr_subgroup_shuffle) && (defined(cl_khr_subgroups) || defined(__opencl_c_subgroups))
#define ES_SUBGROUPS
#ifdef cl_khr_subgroups
#pragma OPENCL EXTENSION cl_khr_subgroups : enable
#endif
#pragma OPENCL EXTENSION cl_khr_subgroup_shuffle : enable
#endif
#if defined(cl_qcom_reqd_sub_group_size) && ES_SUBGROUP == 64
#pragma OPENCL EXTENSION cl_qcom_reqd_sub_group_size : enable
#define ES_LOCKSTEP __attribute__((qcom_reqd_sub_group_size("half")))
#elif defined(cl_intel_required_subgroup_size) && ES_SUBGROUP <= 32
#define ES_LOCKSTEP __attribute__((intel_reqd_sub_group_size(ES_SUBGROUP)))
#else
#define ES_LOCKSTEP
#endif
inline uint es_exchange(__local uint* lanes, uint x, uint mask)
{ /* of the work-item whose number differs by mask < ES_SUBGROUP; all of the work-group come here */
#ifdef ES_SUBGROUPS
    if (get_max_sub_group_size() % ES_SUBGROUP == 0) /* alike for all of them */
        return sub_group_shuffle_xor(x, mask);
#endif
    uint i = get_local_id(0);
    barrier(CLK_LOCAL_MEM_FENCE);
    lanes[i] = x;
    barrier(CLK_LOCAL_MEM_FENCE);
    return lanes[i ^ mask];
}
#define es_shuffle(x, mask) as_float(es_exchange(es_lanes, as_uint(x), mask))
"""

_MMA = """\
inline uint es_half_bits(float x)
{
    ushort bits;
    vstore_half_rte(x, 0, (__private half*)&bits);
    return bits;
}
inline float es_bfloat(uint h) { return as_float(h << 16); }
inline int es_byte(uint b) { return (char)b; }
/* Fragments as tables 'Matrix fragments' of the PTX ISA have them: element (row, k) of A and (k, column) of B in the
   registers of 32 lanes, `each` elements of `bits` bits to a word. */
inline uint es_a(__local const uint* words, uint row, uint k, uint each, uint bits)
{
    uint lane = row % 8 * 4 + k / each % 4, word = row / 8 + k / (4 * each) * 2;
    return words[lane * 6 + word] >> k % each * bits & ((1u << bits) - 1);
}
inline uint es_b(__local const uint* words, uint k, uint column, uint each, uint bits)
{
    uint lane = column * 4 + k / each % 4, word = 4 + k / (4 * each);
    return words[lane * 6 + word] >> k % each * bits & ((1u << bits) - 1);
}
#define ES_MMA(kind, type, K, each, bits, number) \\
inline void es_multiply_##kind(__local uint* words, type* d, uint a0, uint a1, uint a2, uint a3, uint b0, uint b1) \\
{ /* all of the work-group come here; warps are 32 work-items in order */ \\
    uint lane = get_local_id(0) % 32; \\
    __local uint* own = words + get_local_id(0) * 6; \\
    words += get_local_id(0) / 32 * 192; \\
    barrier(CLK_LOCAL_MEM_FENCE); \\
    own[0] = a0, own[1] = a1, own[2] = a2, own[3] = a3, own[4] = b0, own[5] = b1; \\
    barrier(CLK_LOCAL_MEM_FENCE); \\
    for (uint i = 0; i < 4; i++) \\
        for (uint k = 0; k < K; k++) \\
            d[i] += number(es_a(words, lane / 4 + i / 2 * 8, k, each, bits)) \\
                * number(es_b(words, k, lane % 4 * 2 + i % 2, each, bits)); \\
}
ES_MMA(f16, float, 16, 2, 16, es_half)
ES_MMA(bf16, float, 16, 2, 16, es_bfloat)
ES_MMA(s8, int, 32, 4, 8, es_byte)
#define es_mma_f16(...) es_multiply_f16(es_fragments, __VA_ARGS__)
#define es_mma_bf16(...) es_multiply_bf16(es_fragments, __VA_ARGS__)
#define es_mma_s8(...) es_multiply_s8(es_fragments, __VA_ARGS__)
"""
"""What tensor cores do, for a device that has none: slow, and there to check kernels that are written for them."""

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
static __device__ __forceinline__ uint es_half_bits(float x)
{
    ushort bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}
#define ES_MMA(kind, type, c, shape) \\
static __device__ __forceinline__ void es_mma_##kind(type* d, uint a0, uint a1, uint a2, uint a3, uint b0, uint b1) \\
{ \\
    asm("mma.sync.aligned." shape " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \\
        : "+" c(d[0]), "+" c(d[1]), "+" c(d[2]), "+" c(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1)); \\
}
ES_MMA(f16, float, "f", "m16n8k16.row.col.f32.f16.f16.f32")
ES_MMA(bf16, float, "f", "m16n8k16.row.col.f32.bf16.bf16.f32")
ES_MMA(s8, int, "r", "m16n8k32.row.col.s32.s8.s8.s32")
"""


def preamble(gpu: Any) -> str:
    """What stands before the kernels. gpu: see devices.profile.Gpu; OpenCL text goes by its `half` and `subgroup`, and
    each of these has a way of its own on a device that lacks the extension."""
    if gpu.backend == "cuda":
        return CUDA
    shuffle = f"#define ES_SUBGROUP {gpu.subgroup}\n{_SHUFFLE}" if gpu.subgroup else ""
    return OPENCL + (_HALF if gpu.half else _HALF_BY_INTEGERS) + shuffle + (_MMA if gpu.mma else "")


def program(funcs: list[PrimFunc], threads: Mapping[str, int], gpu: Any, target: TvmTarget) -> str:
    """One program text with every kernel of `funcs` (lowered) as an entry of its name; threads: of its blocks."""
    build = get_global_func(f"target.build.{gpu.backend}")
    parts = [preamble(gpu)]
    for func in funcs:
        name = str(func.attrs["global_symbol"])
        text = str(build(IRModule({name: func}), target).inspect_source())
        parts.append(_opencl(text, name, threads[name]) if gpu.backend == "opencl" else _cuda(text))
    return "\n".join(parts)


def _cuda(text: str) -> str:
    """Without TVM's preamble, which includes headers that NVRTC alone does not have.

    And without __restrict__: it would allow to read ahead of es_await, as from memory that nobody writes.
    """
    start = text.index('extern "C" __global__')
    return _without_declaration(text[start:]).replace(" __restrict__", "")


def _opencl(text: str, name: str, threads: int) -> str:
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
    size = f"__attribute__((reqd_work_group_size({threads}, 1, 1)))"
    if "es_shuffle(" in body:
        size, opened = f"ES_LOCKSTEP {size}", f"  __local uint es_lanes[{threads}];\n{opened}"
    if "es_mma_" in body:
        opened = f"  __local uint es_fragments[{6 * threads}];\n{opened}"
    return f"{size}\n__kernel void {name}({pairs}) {{\n{opened}{body}"


def _without_declaration(text: str) -> str:
    """TVM writes each kernel's declaration on a line before its definition."""
    first, _, rest = text.partition("\n")
    return rest if first.rstrip().endswith(";") else text
