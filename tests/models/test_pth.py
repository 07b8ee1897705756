"""Files of tensors without a config: hostile, broken and foreign ones are refused in one sentence, by name."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import edgeseq.cli as cli
from edgeseq.errors import SourceError, UsageError
from edgeseq.models.source import open_source
from tests.models import blink

Tensors = dict[str, torch.Tensor]


def refused(path: Path) -> str:
    with pytest.raises(SourceError) as caught:
        open_source(str(path))
    said = str(caught.value)
    assert "\n" not in said
    assert len(said) < 400 + len(str(path))
    return said


def saved(folder: Path, version: int, change: Callable[[Tensors], Any], **how: Any) -> Path:
    tensors = blink.checkpoint(version)
    given = change(tensors)
    torch.save(tensors if given is None else given, folder / "model.pth", **how)
    return folder / "model.pth"


class Bomb:
    """What unpickling makes of it: a call that writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)


def test_a_pickle_that_would_run_code_does_not(tmp_path: Path) -> None:
    target = tmp_path / "ran"
    path = saved(tmp_path, 4, lambda t: {**t, "extra": Bomb(target)})
    torch.load(path, weights_only=False)
    assert target.exists(), "the attack itself works"
    target.unlink()
    assert "posix.system, which could run code" in refused(path)
    assert not target.exists()


def test_the_same_in_the_old_format_and_as_a_bare_pickle(tmp_path: Path) -> None:
    target = tmp_path / "ran"
    old = saved(tmp_path, 4, lambda t: {**t, "extra": Bomb(target)}, _use_new_zipfile_serialization=False)
    assert "not the zip" in refused(old)
    bare = tmp_path / "bare.pth"
    bare.write_bytes(pickle.dumps({"emb.weight": Bomb(target)}))
    assert "not the zip" in refused(bare)
    assert not target.exists()


def test_a_call_by_name_inside_the_zip(tmp_path: Path) -> None:
    """A hand-made data.pkl: GLOBAL builtins.eval, its argument, REDUCE."""
    path, target = saved(tmp_path, 4, lambda t: None), tmp_path / "ran"
    code = f"open({str(target)!r},'w')".encode()
    hostile = b"\x80\x02cbuiltins\neval\nX" + len(code).to_bytes(4, "little") + code + b"\x85R."
    changed = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(changed, "w") as new:
        for entry in old.infolist():
            new.writestr(entry, hostile if entry.filename.endswith("/data.pkl") else old.read(entry))
    path.write_bytes(changed.getvalue())
    assert "it asks for eval" in refused(path)
    assert not target.exists()


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"\x80\x02}.", b"not a file of tensors" * 9, bytes(4096)])
def test_files_that_are_no_checkpoint(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    path.write_bytes(data)
    assert ("zip is not whole" if data.startswith(b"PK") else "not the zip") in refused(path)


def test_a_truncated_file(tmp_path: Path) -> None:
    path = saved(tmp_path, 7, lambda t: None)
    whole = path.read_bytes()
    for share in (0.3, 0.9, 0.999):
        path.write_bytes(whole[: int(share * len(whole))])
        refused(path)


def replaced(name: str, value: Any) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name] = value

    return change


def dropped(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        del tensors[name]

    return change


WIDE = torch.zeros(1)
# fmt: off
BROKEN: list[tuple[int, Callable[[Tensors], Any], str]] = [
    (4, lambda t: list(t.values()), "holds a list of 60"),
    (4, lambda t: {}, "holds a dict of 0"),
    (4, lambda t: {"model": t}, "'model' is a dict"),
    (4, lambda t: t | {3: WIDE}, "the key 3"),
    (4, replaced("emb.weight", 7), "'emb.weight' is a int"),
    (4, replaced("head.weight", torch.zeros(67, 48, dtype=torch.int8)), "'head.weight' is a strided int8"),
    (4, replaced("head.weight", torch.eye(67, 48).to_sparse()), "'head.weight' is a sparse_coo"),
    (4, replaced("emb.weight", WIDE.expand(1 << 40, 48)), "'emb.weight' does not lie in the file"),
    (7, replaced("head.weight", torch.zeros(48, 67).T), "'head.weight' does not lie in the file"),
    (6, replaced("ln_out.bias", torch.zeros(0)), "'ln_out.bias' does not lie in the file"),
    (4, dropped("blocks.1.att.time_decay"), "lacks blocks.1.att.time_decay"),
    (5, dropped("blocks.2.ffn.time_mix_k"), "lacks blocks.2.ffn.time_mix_k"),
    (6, dropped("blocks.0.att.time_decay_w1"), "lacks blocks.0.att.time_decay_w1"),
    (7, dropped("blocks.1.att.v1"), "lacks blocks.1.att.v1"),
    (7, dropped("emb.weight"), "lacks emb.weight"),
    (4, replaced("blocks.0.att.surplus", WIDE), "also holds blocks.0.att.surplus"),
    (7, replaced("blocks.1.ffn.s_emb.weight", torch.zeros(67, 48)), "also holds blocks.1.ffn.s_emb.weight"),
    (7, replaced("blocks.9999.ln1.weight", torch.zeros(48)), "blocks.9999, but none of blocks.3"),
    (4, replaced("blocks.1.att.key.weight", torch.zeros(48, 47)), "blocks.1.att.key.weight has shape [48, 47]"),
    (5, replaced("blocks.0.att.time_decay", torch.zeros(3)), "blocks.0.att.time_decay has shape [3]"),
    (5, dropped("blocks.0.att.gate.weight"), "5.0 or 5.1"),
    (5, replaced("blocks.0.att.time_faaaa", torch.zeros(5, 9)), "no 5 heads"),
    (6, replaced("blocks.0.att.time_faaaa", torch.zeros(2, 3, 8)), "blocks.0.att.time_faaaa has shape [2, 3, 8]"),
    (7, replaced("blocks.0.att.r_k", torch.zeros(4, 48)), "blocks.0.att.r_k has shape [4, 48]"),
    (7, lambda t: {"layers.0.weight": t["emb.weight"]}, "none of rwkv4, rwkv5, rwkv6, rwkv7"),
]
# fmt: on


@pytest.mark.parametrize(("version", "change", "wanted"), BROKEN, ids=[wanted for _, _, wanted in BROKEN])
def test_what_contradicts_itself_is_named(
    version: int, change: Callable[[Tensors], Any], wanted: str, tmp_path: Path
) -> None:
    assert wanted in refused(saved(tmp_path, version, change))


@pytest.mark.parametrize("version", [4, 5, 6, 7])
def test_ordered_dicts_and_parameters_are_tensors_too(version: int, tmp_path: Path) -> None:
    path = saved(tmp_path, version, lambda t: OrderedDict((n, torch.nn.Parameter(x)) for n, x in t.items()))
    opened = open_source(str(path))
    assert opened.config.n_layers == blink.L
    assert (opened.tensor("head") == blink.checkpoint(version)["head.weight"].numpy()).all()


def test_one_head_and_one_layer(tmp_path: Path) -> None:
    """Axes of length 1 tell nothing apart: r_k [1,48] is one head."""
    keep = ("blocks.1.", "blocks.2.", "blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2")

    def small(tensors: Tensors) -> Tensors:
        kept = {n: t for n, t in tensors.items() if not n.startswith(keep)}
        return kept | {"blocks.0.att.r_k": tensors["blocks.0.att.r_k"].reshape(1, 48)}

    config = open_source(str(saved(tmp_path, 7, small))).config
    assert (config.n_heads, config.n_layers) == (1, 1)


def test_other_suffixes_and_absent_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        open_source(str(tmp_path / "absent.pth"))
    path = saved(tmp_path, 4, lambda t: None)
    path.rename(tmp_path / "model.bin")
    with pytest.raises(UsageError, match="is a file, not a model source"):
        open_source(str(tmp_path / "model.bin"))


def test_the_command_says_it_in_one_sentence(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path, 4, lambda t: {**t, "extra": Bomb(tmp_path / "ran")})
    assert cli.run(["export", str(path), "-o", str(tmp_path / "out")]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert "which could run code" in err
    assert "hint: " in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.pth"]


def test_the_list_says_who_reads_such_files(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["list", "families", "--json"]) == 0
    loads = {f["name"]: f["loads"] for f in json.loads(capfd.readouterr().out)}
    assert {name for name, kinds in loads.items() if ".pth" in kinds} == {"rwkv4", "rwkv5", "rwkv6", "rwkv7"}
    assert loads["rwkv4"] == ["rwkv", ".pth"]
