"""A state as if `position` tokens had been read, for depths that would take too long to reach by reading.

Its values are small seeded numbers: decode does the same work whatever they are.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

import numpy as np

from edgeseq.bundle.format import DTYPES
from edgeseq.spec import StateSlot
from edgeseq.verify.report import Array

MAGIC = b"ESSTATE\0"
VERSION = 1
SEED = 11
SPREAD = 0.05
_BLOCK = 1 << 16


def slot_values(slot: StateSlot) -> Array:
    """Values of one slot in its shape; bfloat16 as bit patterns in uint16. Slots of integers keep their fresh value."""
    assert slot.dtype in DTYPES
    if slot.dtype not in ("float32", "float16", "bfloat16"):
        return np.full(slot.shape, slot.init, slot.dtype)
    block = np.random.default_rng(SEED).standard_normal(_BLOCK, np.float32) * np.float32(SPREAD)
    if slot.dtype == "bfloat16":
        return np.resize((block.view(np.uint32) >> 16).astype(np.uint16), slot.shape)
    return np.resize(block.astype(slot.dtype), slot.shape)


def saved_state(model_id: str, slots: Sequence[StateSlot], position: int) -> bytes:
    """The bytes of a saved state at `position`, as docs/bundle-format.md says."""
    parts = []
    for slot in slots:
        values = slot_values(slot)
        if slot.update == "append":
            rows = min(position, slot.shape[slot.axis or 0])
            values = values[(slice(None),) * (slot.axis or 0) + (slice(rows),)]
        parts.append(np.ascontiguousarray(values).tobytes())
    payload = b"".join(parts)
    rest = bytes.fromhex(model_id) + struct.pack("<QQ", position, len(payload)) + payload
    return MAGIC + struct.pack("<II", VERSION, zlib.crc32(rest)) + rest
