"""Text to token ids and back: the tokenizer.json beside a bundle, or bytes, or none."""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import Any, Protocol

from edgeseq.errors import BundleError

TOKENIZER_FILE = "tokenizer.json"
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Text(Protocol):
    """encode: text -> ids. decode: ids -> text. feed: the text that one more id makes certain; flush: the rest."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...

    def feed(self, token: int) -> str: ...

    def flush(self) -> str: ...


def open_text(bundle: Path, own: str) -> Text | None:
    """The tokenizer of a bundle; `own` is what `model.edgeseq` itself declares ("bytes" or "none")."""
    path = bundle / TOKENIZER_FILE
    if path.is_file():
        return _Tokenizer(path)
    return _Bytes() if own == "bytes" else None


class _Bytes:
    """A token is a byte of UTF-8; ids from 256 on (padding of the vocabulary) have no text."""

    def __init__(self) -> None:
        self._stream = codecs.getincrementaldecoder("utf-8")("replace")

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def feed(self, token: int) -> str:
        return self._stream.decode(bytes([token])) if token < 256 else ""

    def flush(self) -> str:
        return self._stream.decode(b"", final=True)


class _Tokenizer:
    """Hugging Face's tokenizer.json. A token may be part of a character, and its text may depend on its neighbours:
    while streaming, the ids since the last certain point are decoded together."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        try:
            self._tokenizer: Any = Tokenizer.from_file(str(path))
        except Exception as error:
            raise BundleError(f"{path} is not a tokenizer: {str(error).partition(chr(10))[0]}") from None
        self._ids: list[int] = []
        self._shown = ""

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids)
        return text

    def feed(self, token: int) -> str:
        self._ids.append(token)
        text = self.decode(self._ids)
        if text.endswith(REPLACEMENT) or not text.startswith(self._shown):
            return ""
        new = text[len(self._shown) :]
        self._ids = self._ids[-1:] if len(self._ids) > 8 else self._ids
        self._shown = self.decode(self._ids)
        return new

    def flush(self) -> str:
        rest = self.decode(self._ids)[len(self._shown) :]
        self._ids, self._shown = [], ""
        return rest
