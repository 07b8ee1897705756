"""This machine."""

from __future__ import annotations

import platform
from collections.abc import Sequence

from devices.profile import AUTO, Profile
from devices.transports.base import Completed, SharedFiles, run_here
from edgeseq.errors import DeviceError


class LocalTransport(SharedFiles):
    """Runs programs where edgeseq runs; refuses a profile of another architecture."""

    def __init__(self, profile: Profile) -> None:
        super().__init__(profile)
        here = platform.machine()
        if profile.triple != AUTO and profile.arch != here:
            raise DeviceError(
                f"{profile.name} is {profile.arch}, this machine is {here}",
                f"run this on the device, or use --device qemu-{profile.arch} to check results without it",
            )

    def run(self, argv: Sequence[str], timeout: float = 600.0) -> Completed:
        return run_here(argv, timeout)


TRANSPORT = LocalTransport
