"""`edgeseq.h` in ctypes: structures and prototypes, nothing else. docs/abi.md says what may change."""

from __future__ import annotations

import ctypes
from ctypes import CDLL, POINTER, Structure, c_char, c_char_p, c_double, c_float, c_int32, c_size_t
from pathlib import Path
from typing import Any

c_uint8, c_uint32, c_uint64, _P = ctypes.c_uint8, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_void_p

ABI_VERSION = 1

OK = 0
CLASS_ARGUMENT, CLASS_SYSTEM, CLASS_MEMORY, CLASS_FORMAT, CLASS_LIBRARY, CLASS_STATE, CLASS_CONTEXT, CLASS_BUSY = (
    1, 2, 3, 4, 5, 6, 7, 8,
)  # fmt: skip
CLASS_DEVICE = 9
POISON = 1
SPIN_DEFAULT = 20000


class _Sized(Structure):
    """A struct that states its size, as every struct of the header that may grow does."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(struct_size=ctypes.sizeof(type(self)), **fields)


class Error(_Sized):
    _fields_ = [("struct_size", c_uint32), ("text", c_char * 252)]


class Options(_Sized):
    _fields_ = [
        ("struct_size", c_uint32), ("flags", c_uint32), ("n_threads", c_int32), ("spin", c_uint32),
        ("cores", POINTER(c_int32)), ("n_cores", c_uint32), ("kernels", _P),
    ]  # fmt: skip


class ModelInfo(_Sized):
    _fields_ = [
        ("struct_size", c_uint32), ("vocab", c_uint32), ("context", c_uint32), ("n_graphs", c_uint32),
        ("n_slots", c_uint32), ("n_io", c_uint32), ("n_threads", c_uint32), ("tokenizer", c_uint32),
        ("takes_tokens", c_uint32), ("abi_version", c_uint32), ("model_id", c_uint8 * 16), ("file_bytes", c_uint64),
        ("weight_bytes", c_uint64), ("state_bytes", c_uint64), ("io_bytes", c_uint64), ("arena_bytes", c_uint64),
    ]  # fmt: skip


class DeviceInfo(_Sized):
    _fields_ = [
        ("struct_size", c_uint32), ("backend", c_uint32), ("weight_bytes", c_uint64), ("session_bytes", c_uint64),
        ("text", c_char * 256),
    ]  # fmt: skip


class GraphInfo(_Sized):
    _fields_ = [
        ("struct_size", c_uint32), ("tokens", c_uint32), ("n_launches", c_uint32), ("reserved", c_uint32),
        ("arena_bytes", c_uint64), ("name", c_char_p),
    ]  # fmt: skip


class TensorInfo(_Sized):
    _fields_ = [
        ("struct_size", c_uint32), ("dtype", c_uint32), ("rank", c_uint32), ("role", c_uint32), ("graph", c_uint32),
        ("is_output", c_uint32), ("update", c_uint32), ("axis", c_int32), ("dims", c_uint64 * 4), ("bytes", c_uint64),
        ("name", c_char_p),
    ]  # fmt: skip


class Sampler(_Sized):
    _fields_ = [
        ("struct_size", c_uint32), ("top_k", c_int32), ("temperature", c_float), ("top_p", c_float),
        ("min_p", c_float), ("repetition_penalty", c_float), ("seed", c_uint64),
    ]  # fmt: skip


_SIZE = POINTER(c_size_t)
_TOKENS = POINTER(c_int32)
_WHY = POINTER(Error)

_PROTOTYPES: dict[str, tuple[Any, list[Any]]] = {
    "es_abi_version": (c_uint32, []),
    "es_status_text": (c_char_p, [c_int32]),
    "es_cpu_has": (ctypes.c_int, [c_char_p]),
    "es_model_open": (c_int32, [c_char_p, POINTER(Options), POINTER(_P), _WHY]),
    "es_model_check": (c_int32, [_P, _WHY]),
    "es_model_close": (c_int32, [POINTER(_P)]),
    "es_pin_caller": (c_int32, [_P]),
    "es_model_get_info": (c_int32, [_P, POINTER(ModelInfo)]),
    "es_model_device": (c_int32, [_P, POINTER(DeviceInfo)]),
    "es_model_graph": (c_int32, [_P, c_uint32, POINTER(GraphInfo)]),
    "es_model_io": (c_int32, [_P, c_uint32, POINTER(TensorInfo)]),
    "es_model_slot": (c_int32, [_P, c_uint32, POINTER(TensorInfo)]),
    "es_session_need": (c_int32, [_P, _SIZE]),
    "es_session_create": (c_int32, [_P, _P, c_size_t, POINTER(_P), _WHY]),
    "es_session_close": (c_int32, [POINTER(_P)]),
    "es_prefill": (c_int32, [_P, _TOKENS, c_size_t]),
    "es_step": (c_int32, [_P, c_int32]),
    "es_logits": (POINTER(c_float), [_P]),
    "es_position": (c_uint64, [_P]),
    "es_reset": (c_int32, [_P]),
    "es_input": (c_int32, [_P, c_uint32, c_char_p, POINTER(_P), _SIZE]),
    "es_output": (c_int32, [_P, c_uint32, c_char_p, POINTER(_P), _SIZE]),
    "es_run": (c_int32, [_P, c_uint32]),
    "es_profile": (c_int32, [_P, c_uint32, POINTER(c_uint64), c_size_t]),
    "es_session_fork": (c_int32, [_P, _P, c_size_t, POINTER(_P), _WHY]),
    "es_session_copy": (c_int32, [_P, _P]),
    "es_state_bytes": (c_int32, [_P, _SIZE]),
    "es_state_save": (c_int32, [_P, _P, c_size_t, _SIZE]),
    "es_state_load": (c_int32, [_P, _P, c_size_t, _WHY]),
    "es_encode": (c_int32, [_P, c_char_p, c_size_t, _TOKENS, c_size_t, _SIZE]),
    "es_decode": (c_int32, [_P, _TOKENS, c_size_t, c_char_p, c_size_t, _SIZE]),
    "es_sample": (c_int32, [_P, POINTER(Sampler), _TOKENS, c_size_t, _TOKENS]),
    "es_sample_logits": (
        c_int32,
        [POINTER(Sampler), POINTER(c_float), c_size_t, _TOKENS, c_size_t, POINTER(c_float), _TOKENS],
    ),
    "es_generate": (c_int32, [_P, POINTER(Sampler), c_size_t, c_size_t, _TOKENS, POINTER(c_uint64)]),
    "es_measure_read": (c_int32, [_P, _P, c_size_t, c_uint32, POINTER(c_double)]),
    "es_measure_launch": (c_int32, [_P, c_int32, c_uint32, POINTER(c_double)]),
}


_ADDED = {"es_model_device"}
"""Functions that older libraries of this ABI version lack."""


def open_library(path: Path) -> CDLL:
    """Load a library and type its functions. OSError when it is not one for this machine; AttributeError when a
    function is missing that always was there."""
    library = CDLL(str(path))
    for name, (result, arguments) in _PROTOTYPES.items():
        if name in _ADDED and not hasattr(library, name):
            continue
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
    return library
