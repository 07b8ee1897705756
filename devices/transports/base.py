"""What every transport offers: put a bundle on the device, run a program there, move files."""

from __future__ import annotations

import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from devices.profile import Profile
from edgeseq.errors import BundleError, DeviceError

MODEL_FILE = "model.edgeseq"
DRIVER = "edgeseq-device"
"""The static command-line driver inside a bundle; what it understands stands in runtimes/c/tools."""


@dataclass(frozen=True)
class Completed:
    """A program that ran to its end on the device."""

    argv: tuple[str, ...]
    returncode: int
    stdout: str
    stderr: str


class Transport(ABC):
    """The way to one device; a context manager that leaves nothing behind there.

    The constructor raises DeviceError when the device cannot be reached from here. Paths are those of the device.
    """

    def __init__(self, profile: Profile) -> None:
        self.profile = profile

    @abstractmethod
    def push(self, bundle: Path) -> str:
        """Make the bundle directory available; returns its path."""

    @abstractmethod
    def run(self, argv: Sequence[str], timeout: float = 600.0) -> Completed:
        """Run a program of the device to its end. DeviceError if it cannot start or takes more than `timeout` s."""

    @abstractmethod
    def scratch(self, name: str) -> str:
        """The path of a file to read and write, gone after `close`."""

    @abstractmethod
    def read(self, path: str) -> bytes:
        """The content of a file."""

    @abstractmethod
    def write(self, path: str, data: bytes) -> None:
        """Make a file."""

    @abstractmethod
    def close(self) -> None:
        """Remove scratch files."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def driver(self, handle: str, *arguments: str, timeout: float = 600.0) -> Completed:
        """Run the driver of a pushed bundle on its model. DeviceError with its last words if it fails."""
        done = self.run([f"{handle}/{DRIVER}", f"{handle}/{MODEL_FILE}", *arguments], timeout)
        if done.returncode:
            words = done.stderr.strip().splitlines()
            raise DeviceError(
                f"{DRIVER} on {self.profile.name} ended with {done.returncode}: {words[-1] if words else 'no message'}"
            )
        return done


class SharedFiles(Transport):
    """A transport to something that sees this machine's files."""

    def __init__(self, profile: Profile) -> None:
        super().__init__(profile)
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    def push(self, bundle: Path) -> str:
        if not (bundle / DRIVER).is_file():
            raise BundleError(f"{bundle} has no {DRIVER}", "compile the model again")
        return str(bundle.resolve())

    def scratch(self, name: str) -> str:
        if self._scratch is None:
            self._scratch = tempfile.TemporaryDirectory(prefix="edgeseq-")
        return str(Path(self._scratch.name, name))

    def read(self, path: str) -> bytes:
        try:
            return Path(path).read_bytes()
        except OSError as error:
            raise DeviceError(f"{path} cannot be read: {error.strerror}") from None

    def write(self, path: str, data: bytes) -> None:
        Path(path).write_bytes(data)

    def close(self) -> None:
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = None


def run_here(argv: Sequence[str], timeout: float) -> Completed:
    """Run a program of this machine to its end, with nothing on its standard input."""
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        raise DeviceError(f"{argv[0]} took more than {timeout:g} seconds") from None
    except OSError as error:
        raise DeviceError(f"{argv[0]} cannot be run: {error.strerror}") from None
    return Completed(tuple(argv), done.returncode, done.stdout, done.stderr)
