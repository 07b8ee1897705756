"""User-mode emulation on this machine: the program is foreign, files and kernel are ours.

Option `emulator`: the program, e.g. "qemu-aarch64-static". Option `sysroot`: where a dynamic program finds its
loader; the driver is static and needs none.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from devices.profile import Profile
from devices.transports.base import Completed, SharedFiles, run_here
from edgeseq.errors import DeviceError


class QemuTransport(SharedFiles):
    def __init__(self, profile: Profile) -> None:
        super().__init__(profile)
        options = dict(profile.transport_options)
        self.emulator = options.get("emulator", f"qemu-{profile.arch}-static")
        self.sysroot = options.get("sysroot", "")
        if shutil.which(self.emulator) is None:
            raise DeviceError(f"{self.emulator} is not installed", "apt-get install qemu-user-static")

    def run(self, argv: Sequence[str], timeout: float = 600.0) -> Completed:
        sysroot = ["-L", self.sysroot] if self.sysroot else []
        return run_here([self.emulator, *sysroot, *argv], timeout)


TRANSPORT = QemuTransport
