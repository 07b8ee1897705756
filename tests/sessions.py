"""What tests do with a stream of the compiled runtime."""

from __future__ import annotations

from edgeseq.runtime import Session


def moved(session: Session, how: str) -> Session:
    """The same stream in another session: through bytes, by a fork whose origin goes astray, reloaded, or as it is."""
    if how == "save":
        other = session.model.session()
        other.prefill([1, 2, 3])
        other.load(session.save())
        return other
    if how == "fork":
        other = session.fork()
        session.step(0)
        return other
    if how == "reload":
        state = session.save()
        session.step(1)
        session.load(state)
    return session
