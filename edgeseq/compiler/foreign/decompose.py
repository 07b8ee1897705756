"""Operators that neither a rule nor TVM knows, written with operators that they know."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from .build import Build
from .recurrent import gru, lstm, rnn

Decomposer = Callable[[ir.Node, Build, str], list[ir.Value]]
_DECOMPOSERS: dict[str, Decomposer] = {"LSTM": lstm, "GRU": gru, "RNN": rnn}


def decompose(model: ir.Model, label: str, known: Callable[[str, str], bool]) -> bool:
    """Replace nodes in place; whether there were any."""
    found = False
    for node in list(model.graph):
        if node.domain in ("", "ai.onnx") and node.op_type in _DECOMPOSERS and not known("", node.op_type):
            build = Build(node)
            build.replace(_DECOMPOSERS[node.op_type](node, build, label))
            found = True
    return found
