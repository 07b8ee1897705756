"""What every transport offers: put a bundle on the device, run a program there."""

from __future__ import annotations

import subprocess
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from devices.profile import Profile
from edgeseq.errors import BundleError, DeviceError

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
    """The way to one device. Raises DeviceError in the constructor when the device cannot be reached from here."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile

    @abstractmethod
    def push(self, bundle: Path) -> str:
        """Make the bundle directory available; returns its path on the device."""

    @abstractmethod
    def run(self, argv: Sequence[str], timeout: float = 600.0) -> Completed:
        """Run a program of the device to its end. DeviceError if it cannot start or takes more than `timeout` s."""

    def driver(self, handle: str, *arguments: str, timeout: float = 600.0) -> Completed:
        """Run the driver of a pushed bundle. DeviceError with its last words if it fails."""
        done = self.run([f"{handle}/{DRIVER}", *arguments], timeout)
        if done.returncode:
            words = done.stderr.strip().splitlines()
            raise DeviceError(
                f"{DRIVER} on {self.profile.name} ended with {done.returncode}: {words[-1] if words else 'no message'}"
            )
        return done


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


def existing_bundle(bundle: Path) -> str:
    """The absolute path of a bundle that has a driver."""
    if not (bundle / DRIVER).is_file():
        raise BundleError(f"{bundle} has no {DRIVER}", "compile the model again")
    return str(bundle.resolve())
