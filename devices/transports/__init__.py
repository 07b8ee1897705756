"""How to reach a device: `open_transport(profile)` finds `<kind>.py` here, which holds a class `TRANSPORT`."""

from __future__ import annotations

import pkgutil
from importlib import import_module

from devices.profile import Profile
from devices.transports.base import Transport
from edgeseq.errors import DeviceError

__all__ = ["Transport", "open_transport", "transport_kinds"]


def transport_kinds() -> list[str]:
    """Kinds that exist."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != "base")


def open_transport(profile: Profile) -> Transport:
    """The way to `profile`. Raises DeviceError when it cannot be gone from here, with the reason."""
    if profile.transport not in transport_kinds():
        raise DeviceError(
            f"the profile {profile.name} wants the transport {profile.transport!r}, which does not exist",
            f"known: {', '.join(transport_kinds())}",
        )
    transport: Transport = import_module(f"{__name__}.{profile.transport}").TRANSPORT(profile)
    return transport
