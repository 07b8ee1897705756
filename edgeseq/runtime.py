"""The C runtime from Python, through ctypes alone: `load(bundle)` -> `Model` -> `Session`.

A bundle holds native code (`libmodel.so`): load only bundles that you trust like a program.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from ctypes import byref, c_double, c_int32, c_size_t, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeseq import runtime_abi as abi
from edgeseq.bundle.format import BACKENDS, DTYPES, MODEL_FILE, ROLES, UPDATES
from edgeseq.errors import BundleError, EdgeseqError, RuntimeFailure, UsageError
from edgeseq.runtime_types import GREEDY, Graph, ModelInfo, Sampling, Tensor

__all__ = ["GREEDY", "Graph", "Model", "ModelInfo", "Sampling", "Session", "Tensor", "load"]

LIBRARY_FILE = "libmodel.so"

_NUMPY = {name: np.dtype("uint16" if name == "bfloat16" else name) for name in DTYPES}

_HINTS = {
    abi.CLASS_FORMAT: "compile the bundle again, or copy it again if it was transferred",
    abi.CLASS_LIBRARY: "compile the bundle again for this machine",
    abi.CLASS_STATE: "use a state that this model saved",
    abi.CLASS_CONTEXT: "reset the session, or export the model with a larger --context",
    abi.CLASS_DEVICE: "see GPUs in docs/runtime.md; compiled for the CPU, the same model runs without one",
}


def load(bundle: str | Path, threads: int | None = None, cores: Sequence[int] = (), poison: bool = False) -> Model:
    """Open a bundle directory.

    threads: size of the pool, the caller counting as one; None = as many as the bundle's profile says, else one per
             core that this process may use.
    cores:   pin thread i to cores[i % len]; () = where the profile says, if anywhere. The calling thread itself is
             pinned only by `Model.pin_caller()`.
    poison:  for tests, fill the scratch memory with NaN before every graph.
    Raises BundleError when the bundle is incomplete or malformed, RuntimeFailure when this machine cannot run it.
    """
    directory = Path(bundle)
    if not directory.is_dir():
        raise BundleError(f"there is no bundle at {directory}", "give the directory that 'edgeseq compile' wrote")
    for name in (MODEL_FILE, LIBRARY_FILE):
        if not (directory / name).is_file():
            raise BundleError(f"the bundle {directory} has no {name}", "compile it again")
    if threads is not None and not 1 <= threads <= 256:
        raise UsageError(f"{threads} threads were asked for, possible are 1 to 256")
    return Model(directory, _library(directory / LIBRARY_FILE), threads or 0, cores, poison)


def _library(path: Path) -> ctypes.CDLL:
    try:
        library = abi.open_library(path.resolve())
    except OSError as error:
        raise RuntimeFailure(
            f"{path} cannot be loaded here: {error}",
            "a bundle compiled for another machine runs there, with edgeseq-device",
        ) from None
    except AttributeError as error:
        raise BundleError(f"{path} is not an edgeseq library: {error}", "compile the bundle again") from None
    version = library.es_abi_version()
    if version != abi.ABI_VERSION:
        raise RuntimeFailure(f"{path} has ABI version {version}, this package speaks {abi.ABI_VERSION}")
    return library


def _refusal(library: ctypes.CDLL, status: int, why: abi.Error | None = None, what: str = "") -> EdgeseqError:
    sentence = library.es_status_text(status).decode()
    if why is not None and why.text:
        sentence = why.text.decode(errors="replace")
    kind = status & 0xFF
    cls = BundleError if kind in (abi.CLASS_FORMAT, abi.CLASS_STATE) else RuntimeFailure
    return cls(f"{what}: {sentence}" if what else sentence, _HINTS.get(kind, ""))


def _close_model(library: ctypes.CDLL, handle: c_void_p, owner: int) -> None:
    """In a forked child the threads to be joined do not exist: the process that opened the model closes it."""
    if os.getpid() == owner:
        library.es_model_close(byref(handle))


def _close_session(library: ctypes.CDLL, handle: c_void_p) -> None:
    library.es_session_close(byref(handle))


class Model:
    """Weights, plan and threads; immutable and shared. Sessions keep their model alive; `close` closes them first."""

    info: ModelInfo

    def __init__(self, directory: Path, library: ctypes.CDLL, threads: int, cores: Sequence[int], poison: bool) -> None:
        self.directory = directory
        self._lib = library
        self._handle = c_void_p()
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()
        pins = (c_int32 * len(cores))(*cores)
        options = abi.Options(
            flags=abi.POISON if poison else 0, n_threads=threads, spin=abi.SPIN_DEFAULT, cores=pins, n_cores=len(cores)
        )
        why = abi.Error()
        path = str(directory / MODEL_FILE).encode()
        status = library.es_model_open(path, byref(options), byref(self._handle), byref(why))
        if status != abi.OK:
            raise _refusal(library, status, why, str(directory))
        self._close = weakref.finalize(self, _close_model, library, self._handle, os.getpid())
        self.info = self._read_info()

    def session(self) -> Session:
        """A new stream at position 0."""
        handle, why = c_void_p(), abi.Error()
        self._ask(self._lib.es_session_create(self._open(), None, 0, byref(handle), byref(why)), why)
        return Session(self, handle)

    def check_weights(self) -> None:
        """Read every weight and compare the checksum; BundleError when it differs."""
        why = abi.Error()
        self._ask(self._lib.es_model_check(self._open(), byref(why)), why)

    def pin_caller(self) -> None:
        """Pin the calling thread to the first of the cores given to `load`."""
        self._ask(self._lib.es_pin_caller(self._open()))

    def encode(self, text: str) -> list[int]:
        """Text to ids with the bundle's own (byte) tokenizer."""
        data, n = text.encode(), c_size_t()
        ids = (c_int32 * max(1, len(data)))()
        self._ask(self._lib.es_encode(self._open(), data, len(data), ids, len(ids), byref(n)))
        return list(ids[: n.value])

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text; bytes that are not UTF-8 become U+FFFD."""
        tokens = self._tokens(ids)
        text, n = ctypes.create_string_buffer(max(1, len(tokens))), c_size_t()
        status = self._lib.es_decode(self._open(), _pointer(tokens), len(tokens), text, len(text), byref(n))
        self._ask(status)
        return text.raw[: n.value].decode(errors="replace")

    def measure_read_bandwidth(self, buffer: NDArray[Any] | None = None, repeats: int = 5) -> float:
        """Bytes per second that the model's threads read from `buffer`, or from the weights; best of `repeats`."""
        rate = c_double()
        address = None if buffer is None else buffer.ctypes.data
        nbytes = 0 if buffer is None else buffer.nbytes
        self._ask(self._lib.es_measure_read(self._open(), address, nbytes, repeats, byref(rate)))
        return rate.value

    def measure_launch(self, grid: int, n: int = 10000) -> float:
        """Mean nanoseconds of an empty launch of `grid` blocks."""
        ns = c_double()
        self._ask(self._lib.es_measure_launch(self._open(), grid, n, byref(ns)))
        return ns.value

    def close(self) -> None:
        """Close the sessions that are left, then the model. Further calls raise RuntimeFailure."""
        for session in list(self._sessions):
            session.close()
        self._close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> c_void_p:
        if not self._close.alive:
            raise RuntimeFailure(f"the model {self.directory} is closed")
        return self._handle

    def _ask(self, status: int, why: abi.Error | None = None) -> None:
        if status != abi.OK:
            raise _refusal(self._lib, status, why)

    def _tokens(self, ids: Iterable[int]) -> NDArray[np.int32]:
        """Ids as int32; the first that is not in the vocabulary is named."""
        wide = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids))
        if wide.size == 0:
            return np.empty(0, np.int32)
        if wide.ndim != 1 or wide.dtype.kind not in "iu":
            raise UsageError(f"token ids must be a flat sequence of integers, got {wide.dtype} {list(wide.shape)}")
        bad = (wide < 0) | (wide >= self.info.vocab_size)
        if self.info.takes_tokens and bad.any():
            raise RuntimeFailure(f"token id {wide[bad][0]} is not in the vocabulary of {self.info.vocab_size}")
        return np.ascontiguousarray(wide, np.int32)

    def _read_info(self) -> ModelInfo:
        raw, need = abi.ModelInfo(), c_size_t()
        self._ask(self._lib.es_model_get_info(self._handle, byref(raw)))
        self._ask(self._lib.es_session_need(self._handle, byref(need)))
        device = self._read_device()
        return ModelInfo(
            model_id=bytes(raw.model_id).hex(), vocab_size=raw.vocab, context=raw.context,
            takes_tokens=bool(raw.takes_tokens), tokenizer="bytes" if raw.tokenizer else "none",
            threads=raw.n_threads, file_bytes=raw.file_bytes, weight_bytes=raw.weight_bytes,
            state_bytes=raw.state_bytes, io_bytes=raw.io_bytes, arena_bytes=raw.arena_bytes, session_bytes=need.value,
            graphs=tuple(self._graph(i) for i in range(raw.n_graphs)),
            slots=tuple(self._tensor(self._lib.es_model_slot, i) for i in range(raw.n_slots)),
            io=tuple(self._tensor(self._lib.es_model_io, i) for i in range(raw.n_io)),
            backend=BACKENDS[device.backend], device=device.text.decode(errors="replace"),
            device_session_bytes=device.session_bytes,
        )  # fmt: skip

    def _read_device(self) -> abi.DeviceInfo:
        raw = abi.DeviceInfo()
        if hasattr(self._lib, "es_model_device"):  # a library compiled before there was one is for the CPU
            self._ask(self._lib.es_model_device(self._handle, byref(raw)))
        return raw

    def _graph(self, index: int) -> Graph:
        raw = abi.GraphInfo()
        self._ask(self._lib.es_model_graph(self._handle, index, byref(raw)))
        return Graph(raw.name.decode(errors="replace"), raw.tokens, raw.n_launches, raw.arena_bytes)

    def _tensor(self, function: Any, index: int) -> Tensor:
        raw = abi.TensorInfo()
        self._ask(function(self._handle, index, byref(raw)))
        return Tensor(
            raw.name.decode(errors="replace"), DTYPES[raw.dtype], tuple(raw.dims[: raw.rank]), raw.bytes,
            ROLES[raw.role], raw.graph, bool(raw.is_output), UPDATES[raw.update], None if raw.axis < 0 else raw.axis,
        )  # fmt: skip


class Session:
    """One stream: state, position, logits. Calls from several threads take turns; made by `Model.session()`."""

    def __init__(self, model: Model, handle: c_void_p) -> None:
        self.model = model
        self._lib = model._lib
        self._handle = handle
        self._lock = threading.RLock()
        self._close = weakref.finalize(self, _close_session, self._lib, handle)
        model._sessions.add(self)

    def prefill(self, ids: Iterable[int]) -> NDArray[np.float32]:
        """Consume ids, by the largest chunk graphs that fit; logits float32 [V] after the last. Everything is checked
        before anything runs."""
        tokens = self.model._tokens(ids)
        with self._lock:
            self._run(self._lib.es_prefill(self._open(), _pointer(tokens), len(tokens)), len(tokens))
            return self.logits

    def step(self, token: int) -> NDArray[np.float32]:
        """Consume one id; logits float32 [V]."""
        (narrow,) = self.model._tokens([int(token)])
        with self._lock:
            self._run(self._lib.es_step(self._open(), int(narrow)), 1)
            return self.logits

    @property
    def logits(self) -> NDArray[np.float32]:
        """A copy of the logits [V] after the last token; RuntimeFailure when nothing was run since create, reset or
        load (a saved state holds no logits)."""
        with self._lock:
            pointer = self._lib.es_logits(self._open())
            if not pointer:
                raise RuntimeFailure("there are no logits yet", "feed a token first: prefill or step")
            return np.ctypeslib.as_array(pointer, (self.model.info.vocab_size,)).copy()

    @property
    def position(self) -> int:
        """Steps consumed so far."""
        with self._lock:
            return int(self._lib.es_position(self._open()))

    def reset(self) -> None:
        """Back to position 0 and the fresh state."""
        with self._lock:
            self._run(self._lib.es_reset(self._open()))

    def save(self) -> bytes:
        """The stream's whole memory as portable bytes; load them into any session of the same model."""
        with self._lock:
            n = c_size_t()
            self._run(self._lib.es_state_bytes(self._open(), byref(n)))
            buffer = ctypes.create_string_buffer(n.value)
            self._run(self._lib.es_state_save(self._handle, buffer, n.value, byref(n)))
            return buffer.raw

    def load(self, state: bytes) -> None:
        """Resume from `save`'s bytes. BundleError when they are damaged or of another model; the session then stays
        as it was. There are no logits until the next step."""
        with self._lock:
            why = abi.Error()
            data = bytes(state)
            status = self._lib.es_state_load(self._open(), data, len(data), byref(why))
            if status != abi.OK:
                raise _refusal(self._lib, status, why)

    def fork(self) -> Session:
        """A second stream at the same point, logits included."""
        with self._lock:
            handle, why = c_void_p(), abi.Error()
            status = self._lib.es_session_fork(self._open(), None, 0, byref(handle), byref(why))
            if status != abi.OK:
                raise _refusal(self._lib, status, why)
        return Session(self.model, handle)

    def sample(self, sampling: Sampling = GREEDY, recent: Iterable[int] = ()) -> int:
        """Pick an id from the logits; draws with `sampling.seed` itself, so give a fresh seed to draw again."""
        sampler = sampling.to_c()
        return self._sample(sampler, list(recent)[-sampling.window :] if sampling.window > 0 else [])

    def generate(self, n: int, sampling: Sampling = GREEDY, recent: Iterable[int] = ()) -> Iterator[int]:
        """Yield n ids, each picked from the logits and then consumed. `recent`: ids before, for the penalty.
        The session has consumed an id when it is yielded."""
        sampler = sampling.to_c()
        seen = list(recent)
        for _ in range(n):
            with self._lock:
                token = self._sample(sampler, seen[-sampling.window :] if sampling.window > 0 else [])
                self._run(self._lib.es_step(self._open(), token), 1)
            seen.append(token)
            yield token

    def generate_timed(self, n: int, sampling: Sampling = GREEDY) -> tuple[list[int], NDArray[np.uint64]]:
        """n ids and the nanoseconds of each sample and step, looped in C."""
        sampler = sampling.to_c()
        tokens, ns = np.zeros(max(n, 1), np.int32), np.zeros(max(n, 1), np.uint64)
        clock = ns.ctypes.data_as(ctypes.POINTER(c_uint64))
        with self._lock:
            status = self._lib.es_generate(
                self._open(), byref(sampler), n, max(0, sampling.window), _pointer(tokens), clock
            )
            self._run(status, n)
        return tokens[:n].tolist(), ns[:n]

    def run(self, inputs: Mapping[str, NDArray[Any]], graph: int = 0) -> dict[str, NDArray[Any]]:
        """Run one graph of a model whose steps are not tokens: named inputs to named outputs, shapes and dtypes as
        `model.info.io` says. Inputs that are not given keep what they held; position is the runtime's."""
        if not 0 <= graph < len(self.model.info.graphs):
            raise UsageError(f"graph {graph} was asked for, the bundle has {len(self.model.info.graphs)}")
        io = {(t.name, t.is_output): t for t in self.model.info.io if t.graph == graph}
        with self._lock:
            for name, value in inputs.items():
                if (name, False) not in io:
                    known = ", ".join(n for n, out in io if not out)
                    raise UsageError(f"the graph has no input {name!r}", f"its inputs are {known}")
                self._view(io[name, False])[...] = _fitting(io[name, False], value)
            self._run(self._lib.es_run(self._open(), graph), self.model.info.graphs[graph].tokens)
            return {name: self._view(t).copy() for (name, out), t in io.items() if out}

    def profile(self, graph: int = 0) -> NDArray[np.uint64]:
        """Run one graph on the inputs of its last run and return the nanoseconds of each of its launches [launches].

        Launch i is launch i of the bundle's plan. Advances the session by the graph's tokens."""
        if not 0 <= graph < len(self.model.info.graphs):
            raise UsageError(f"graph {graph} was asked for, the bundle has {len(self.model.info.graphs)}")
        facts = self.model.info.graphs[graph]
        ns = np.zeros(facts.n_launches, np.uint64)
        clock = ns.ctypes.data_as(ctypes.POINTER(c_uint64))
        with self._lock:
            self._run(self._lib.es_profile(self._open(), graph, clock, len(ns)), facts.tokens)
        return ns

    def close(self) -> None:
        """Free the stream's memory. Further calls raise RuntimeFailure."""
        with self._lock:
            self._close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> c_void_p:
        if not self._close.alive:
            raise RuntimeFailure("the session is closed")
        return self._handle

    def _run(self, status: int, steps: int = 0) -> None:
        if status == abi.OK:
            return
        if status & 0xFF == abi.CLASS_CONTEXT:
            raise RuntimeFailure(
                f"{steps} more tokens after {self.position} would outgrow the context of {self.model.info.context}",
                _HINTS[abi.CLASS_CONTEXT],
            )
        raise _refusal(self._lib, status)

    def _sample(self, sampler: abi.Sampler, recent: list[int]) -> int:
        tokens, picked = self.model._tokens(recent), c_int32()
        with self._lock:
            status = self._lib.es_sample(self._open(), byref(sampler), _pointer(tokens), len(tokens), byref(picked))
            self._run(status)
        return picked.value

    def _view(self, tensor: Tensor) -> NDArray[Any]:
        """The tensor's place in the session's memory; valid while the session is open."""
        address, n = c_void_p(), c_size_t()
        find = self._lib.es_output if tensor.is_output else self._lib.es_input
        self._run(find(self._open(), tensor.graph, tensor.name.encode(), byref(address), byref(n)))
        raw = memoryview((ctypes.c_uint8 * n.value).from_address(address.value or 0)).cast("B")
        return np.ndarray(tensor.shape, _NUMPY[tensor.dtype], buffer=raw)


def _pointer(tokens: NDArray[np.int32]) -> Any:
    return tokens.ctypes.data_as(ctypes.POINTER(c_int32))


def _fitting(tensor: Tensor, value: NDArray[Any]) -> NDArray[Any]:
    array = np.asarray(value)
    wanted = _NUMPY[tensor.dtype]
    if array.shape != tensor.shape or array.dtype != wanted:
        raise UsageError(
            f"input {tensor.name!r} is {wanted} {list(tensor.shape)}, got {array.dtype} {list(array.shape)}"
        )
    return array
