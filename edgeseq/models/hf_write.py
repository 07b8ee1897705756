"""Write a source as a Hugging Face directory, for tools that read those.

    python -m edgeseq.models.hf_write SOURCE DIR

config.json and float32 tensors under the names of the family's checkpoint, in shards of about a gigabyte, so that one
shard is in memory at a time. A tokenizer.json is copied.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from edgeseq.errors import EdgeseqError, SourceError, UsageError
from edgeseq.files import new_directory
from edgeseq.models import families
from edgeseq.models.base import Array, StoredTensor
from edgeseq.models.source import Source, open_source

SHARD_BYTES = 1 << 30
INDEX = "model.safetensors.index.json"
LOSS = 1e-6
"""What a value may change, relative to itself, when it is written another way (A as log(-A))."""


def write_hf(source: Source, directory: Path) -> None:
    """Write `source` to a new `directory`, which `open_source` then opens as the same model.

    UsageError where the family has no such form, SourceError where this model of it has none.
    """
    record = families().get(source.family)
    checkpoint = record.checkpoint if record else None
    if checkpoint is None or checkpoint.written is None:
        can = ", ".join(f.name for f in families().values() if f.checkpoint and f.checkpoint.written)
        raise UsageError(f"{source.name} is {source.family}, which is not written for Hugging Face", f"it can be {can}")
    raw = checkpoint.written(source.config)
    if checkpoint.config(raw) != source.config:
        raise SourceError(f"{source.name} has options that a config.json of model_type {raw['model_type']} cannot say")
    with new_directory(directory, is_checkpoint, "checkpoint directory") as out:
        (out / "config.json").write_text(json.dumps(raw | {"dtype": "float32"}, indent=2) + "\n")
        weight_map: dict[str, str] = {}
        for index, shard in enumerate(_shards(_stored(source, checkpoint.tensors(source.config)))):
            file = f"model-{index + 1:05d}.safetensors"
            save_file(shard, out / file, {"format": "pt"})
            weight_map |= dict.fromkeys(shard, file)
        (out / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2) + "\n")
        if isinstance(source.tokenizer, Path):
            shutil.copy(source.tokenizer, out / "tokenizer.json")


def is_checkpoint(directory: Path) -> bool:
    """Whether this module wrote it: one that came from elsewhere is not overwritten."""
    return (directory / "model-00001.safetensors").is_file() and (directory / INDEX).is_file()


def _stored(source: Source, tensors: dict[str, StoredTensor]) -> Iterator[tuple[str, Array]]:
    """Every tensor under the name and in the shape it is stored in."""
    for ours, stored in tensors.items():
        value = source.tensor(ours)
        written = np.ascontiguousarray(stored.restore(value), np.float32)
        if written.shape != stored.shape or not np.allclose(stored.convert(written), value, rtol=LOSS, atol=0):
            raise SourceError(f"{ours} of {source.name} cannot be written as {stored.name}")
        yield stored.name, written


def _shards(tensors: Iterable[tuple[str, Array]]) -> Iterator[dict[str, Array]]:
    shard: dict[str, Array] = {}
    for name, value in tensors:
        if shard and sum(a.nbytes for a in shard.values()) + value.nbytes > SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = value
    yield shard


def main() -> int:
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        write_hf(open_source(sys.argv[1]), Path(sys.argv[2]))
    except EdgeseqError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
