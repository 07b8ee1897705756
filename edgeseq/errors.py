"""One exception class per stage. The command line prints `sentence` and `hint`, never a traceback."""

from __future__ import annotations


class EdgeseqError(Exception):
    """A refusal with a reason.

    sentence: what is wrong, with the offending values, as one sentence.
    hint:     what the user can do about it, as one sentence or empty.
    exit_code: 1 when the job or the check failed, 2 when the request itself is wrong.
    """

    exit_code = 1

    def __init__(self, sentence: str, hint: str = "") -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.sentence} ({self.hint})" if self.hint else self.sentence


class UsageError(EdgeseqError):
    """The request is wrong: unknown name, bad option value, missing file."""

    exit_code = 2


class SourceError(EdgeseqError):
    """A model source (checkpoint, zoo name, module file) cannot be loaded."""


class ExportError(EdgeseqError):
    """A model cannot be written as ONNX, or the ONNX disagrees with it."""


class CompileError(EdgeseqError):
    """An exported model cannot be compiled for the target."""


class BundleError(EdgeseqError):
    """A bundle, a plan or a saved state is malformed, truncated or foreign."""


class RuntimeFailure(EdgeseqError):
    """The C runtime reported a status other than ES_OK."""


class DeviceError(EdgeseqError):
    """A device cannot be reached or lacks what the bundle needs."""
