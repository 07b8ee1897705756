"""A bundle's own libmodel.so through ctypes, with the standard library alone: `Model(directory)` -> `Session`."""

from __future__ import annotations

import ctypes
import sys
from array import array
from ctypes import byref, c_double, c_int32, c_size_t, c_uint64, c_void_p
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from edgeseq import runtime_abi as abi


class Refused(Exception):
    """A status other than ES_OK, with its sentence."""


class Model:
    """Weights and plan on the device that the bundle was compiled for."""

    def __init__(self, directory: Path, poison: bool = False) -> None:
        self.directory = directory
        self.lib = abi.open_library((directory / "libmodel.so").resolve())
        self.handle, why = c_void_p(), abi.Error()
        options = abi.Options(flags=abi.POISON if poison else 0, n_threads=2, spin=abi.SPIN_DEFAULT)
        path = str(directory / "model.edgeseq").encode()
        self.ask(self.lib.es_model_open(path, byref(options), byref(self.handle), byref(why)), why)
        self.info, self.device = abi.ModelInfo(), abi.DeviceInfo()
        self.ask(self.lib.es_model_get_info(self.handle, byref(self.info)))
        self.ask(self.lib.es_model_device(self.handle, byref(self.device)))

    def ask(self, status: int, why: abi.Error | None = None) -> None:
        if status != abi.OK:
            text = why.text.decode(errors="replace") if why is not None else ""
            text = text or self.lib.es_status_text(status).decode()
            raise Refused(f"{text} {self.failure()}" if status & 0xFF == abi.CLASS_DEVICE and self.handle else text)

    def failure(self) -> str:
        """What the driver refused last."""
        facts = abi.DeviceInfo()
        if self.lib.es_model_device(self.handle, byref(facts)) != abi.OK:
            return ""
        _, found, words = facts.text.decode(errors="replace").partition("; failed: ")
        return f"[{words}]" if found else ""

    def session(self) -> Session:
        handle, why = c_void_p(), abi.Error()
        self.ask(self.lib.es_session_create(self.handle, None, 0, byref(handle), byref(why)), why)
        return Session(self, handle)

    def check_weights(self) -> None:
        why = abi.Error()
        self.ask(self.lib.es_model_check(self.handle, byref(why)), why)

    def measure_read(self, repeats: int = 5) -> float:
        """Bytes per second."""
        rate = c_double()
        self.ask(self.lib.es_measure_read(self.handle, None, 0, repeats, byref(rate)))
        return rate.value

    def measure_launch(self, grid: int = 128, n: int = 1000) -> float:
        """Nanoseconds."""
        ns = c_double()
        self.ask(self.lib.es_measure_launch(self.handle, grid, n, byref(ns)))
        return ns.value

    def graph(self, index: int) -> abi.GraphInfo:
        info = abi.GraphInfo()
        self.ask(self.lib.es_model_graph(self.handle, index, byref(info)))
        return info

    def slot(self, index: int) -> abi.TensorInfo:
        info = abi.TensorInfo()
        self.ask(self.lib.es_model_slot(self.handle, index, byref(info)))
        return info

    def close(self) -> None:
        self.ask(self.lib.es_model_close(byref(self.handle)))


class Session:
    """One stream."""

    def __init__(self, model: Model, handle: c_void_p) -> None:
        self.model, self.lib, self.handle = model, model.lib, handle

    def prefill(self, tokens: list[int]) -> array[float]:
        """Logits after the last of the tokens."""
        self.model.ask(self.lib.es_prefill(self.handle, (c_int32 * len(tokens))(*tokens), len(tokens)))
        return self.logits()

    def step(self, token: int) -> array[float]:
        self.model.ask(self.lib.es_step(self.handle, token))
        return self.logits()

    def logits(self) -> array[float]:
        pointer = self.lib.es_logits(self.handle)
        if not pointer:
            raise Refused("there are no logits")
        return array("f", ctypes.string_at(pointer, 4 * self.model.info.vocab))

    def generate(self, n: int, timed: bool = False) -> tuple[list[int], list[int]]:
        """n greedy tokens after the logits, each consumed; nanoseconds of each when timed."""
        tokens, ns = (c_int32 * n)(), (c_uint64 * n)()
        sampler = abi.Sampler(temperature=0.0, top_p=1.0, repetition_penalty=1.0)
        clock = ns if timed else None
        self.model.ask(self.lib.es_generate(self.handle, byref(sampler), n, 0, tokens, clock))
        return list(tokens), list(ns)

    def profile(self, graph: int = 0) -> list[int]:
        """Nanoseconds of every launch of one more run of the graph."""
        n = self.model.graph(graph).n_launches
        ns = (c_uint64 * n)()
        self.model.ask(self.lib.es_profile(self.handle, graph, ns, n))
        return list(ns)

    @property
    def position(self) -> int:
        return int(self.lib.es_position(self.handle))

    def save(self) -> bytes:
        n = c_size_t()
        self.model.ask(self.lib.es_state_bytes(self.handle, byref(n)))
        buffer = ctypes.create_string_buffer(n.value)
        self.model.ask(self.lib.es_state_save(self.handle, buffer, n.value, byref(n)))
        return buffer.raw

    def load(self, state: bytes | bytearray) -> None:
        why = abi.Error()
        data = (ctypes.c_char * len(state)).from_buffer(state) if isinstance(state, bytearray) else state
        self.model.ask(self.lib.es_state_load(self.handle, data, len(state), byref(why)), why)

    def fork(self) -> Session:
        handle, why = c_void_p(), abi.Error()
        self.model.ask(self.lib.es_session_fork(self.handle, None, 0, byref(handle), byref(why)), why)
        return Session(self.model, handle)

    def reset(self) -> None:
        self.model.ask(self.lib.es_reset(self.handle))

    def close(self) -> None:
        self.model.ask(self.lib.es_session_close(byref(self.handle)))
