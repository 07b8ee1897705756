"""`path/file.py:factory`: token models and step models with named inputs, and errors that name file and line."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from edgeseq.errors import SourceError, UsageError
from edgeseq.models.base import signature_of
from edgeseq.models.source import open_source, twin_of

TOKEN_MODEL = """
from types import SimpleNamespace
import torch
from edgeseq.spec import StateSlot
from helper import WIDTH

class Sum(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=7)
        self.embed = torch.nn.Embedding(7, WIDTH)
        self.head = torch.nn.Linear(WIDTH, 7, bias=False)
        self.head.weight = self.embed.weight

    def state_slots(self, context):
        return (StateSlot("sum", "float32", (1, WIDTH)),)

    def advance(self, tokens, position, total):
        total = total + self.embed(tokens).sum(1)
        return self.head(total)[:, None], total

def factory():
    return Sum()
"""

STEP_MODEL = """
import torch
from edgeseq.spec import StateSlot, TensorSpec

class Filter(torch.nn.Module):
    inputs = (TensorSpec("frame", "float32", (1, 4)),)
    outputs = (TensorSpec("level", "float32", (1, 1)),)

    def state_slots(self, context):
        return (StateSlot("mean", "float32", (1, 4)),)

    def advance(self, frame, mean):
        mean = 0.9 * mean + 0.1 * frame
        return mean.sum(-1, keepdim=True), mean

factory = Filter
"""


def test_a_token_model_of_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("WIDTH = 3\n")
    (tmp_path / "model.py").write_text(TOKEN_MODEL)
    path_before = list(sys.path)
    source = open_source(f"{tmp_path / 'model.py'}:factory")
    assert sys.path == path_before
    assert (source.family, source.tensor_names(), source.param_count()) == ("custom", ("embed.weight",), 21)
    model = source.build()
    signature = signature_of(model, 8, 0)
    assert [t.name for t in signature.inputs] == ["tokens", "position"]
    assert signature.outputs[0].shape == (1, 1, 7)
    assert np.array_equal(source.tensor("embed.weight"), model.embed.weight.detach().numpy())
    assert {p.device.type for p in source.build("meta").parameters()} == {"meta"}
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_a_step_model_with_named_inputs(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(STEP_MODEL)
    source = open_source(f"{tmp_path / 'model.py'}:factory")
    model = source.build()
    signature = signature_of(model, 1, 0)
    assert [t.name for t in (*signature.inputs, *signature.outputs)] == ["frame", "level"]
    level, mean = model.advance(torch.ones(1, 4), torch.zeros(1, 4))
    assert level.shape == signature.outputs[0].shape
    assert mean.shape == signature.state[0].shape
    with pytest.raises(SourceError, match="chunk of 8"):
        signature_of(model, 8, 0)
    with pytest.raises(SourceError, match="no config"):
        twin_of(source)


def test_a_family_model_from_a_factory_has_its_family_and_twin(tmp_path: Path) -> None:
    text = "from edgeseq.models import families\nF = families()['mamba']\ndef make():\n    return F.model(F.tiny)\n"
    (tmp_path / "model.py").write_text(text)
    source = open_source(f"{tmp_path / 'model.py'}:make")
    assert source.family == "mamba"
    assert twin_of(source).param_count() == pytest.approx(source.param_count(), rel=0.02)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1\ndef factory(:\n", ["line 2", "SyntaxError"]),
        ("\nimport nothing_of_this_name\n", ["line 2", "ModuleNotFoundError", "nothing_of_this_name"]),
        ("def factory():\n    y = 1\n    raise ValueError('first\\nsecond')\n", ["line 3", "ValueError: first"]),
        ("def inner():\n    return 1 / 0\ndef factory():\n    return inner()\n", ["line 2", "ZeroDivisionError"]),
        ("import json\ndef factory():\n    return json.loads('{')\n", ["line 3", "JSONDecodeError"]),
        ("def factory():\n    return 3\n", ["factory() returned int"]),
        ("import torch\ndef factory():\n    return torch.nn.Linear(2, 2)\n", ["Linear lacks advance"]),
        (STEP_MODEL.replace("inputs = (", "inputs = [").replace("4)),)", "4)),]", 1), ["inputs is not a tuple"]),
        (TOKEN_MODEL.replace("vocab_size", "words").replace("from helper import WIDTH", "WIDTH = 3"), ["vocab_size"]),
        (
            STEP_MODEL.replace("return (StateSlot", "oops; return (StateSlot"),
            ["line 10", "NameError"],
        ),
        ("def factory(size):\n    pass\n", ["TypeError", "size"]),
    ],
)
def test_mistakes_become_one_sentence(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "model.py"
    path.write_text(text)
    with pytest.raises(SourceError) as caught:
        open_source(f"{path}:factory")
    assert "\n" not in caught.value.sentence
    assert all(word in caught.value.sentence for word in words), caught.value.sentence


def test_requests_that_name_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        open_source(f"{tmp_path}/absent.py:factory")
    (tmp_path / "model.py").write_text("x = 3\n")
    with pytest.raises(UsageError, match="no function 'factory'"):
        open_source(f"{tmp_path}/model.py:factory")
    with pytest.raises(UsageError, match="FUNCTION"):
        open_source(f"{tmp_path}/model.py")
