"""Close one connection, and count those that a command `disconnect` has closed, on all workers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from relay.core.reasons import Reason
from relay.core.slices import in_slices
from relay.inspect.questions import BadQuestion

if TYPE_CHECKING:
    from relay.hub.hub import Hub
    from relay.inspect.questions import Questions, Values

CLOSED_BY = "closed-by"
CLOSE = "close"
_WITHIN_S = 5.0


async def closed_by(questions: Questions, entry_id: str) -> tuple[int, list[str]]:
    """Return the number of closed connections, and why it may be too small.

    Args:
        entry_id: The command's entry in the control stream.
    """
    answers = await questions.ask(CLOSED_BY, {"command": entry_id}, within_s=_WITHIN_S)
    problems = [
        f"{instance} has not confirmed the command; its connections are not counted"
        for instance in [*answers.silent, *answers.failed]
    ]
    return sum(int(each["closed"]) for each in answers.by_worker.values()), problems


class ConnectionCloser:
    """Closes a connection of this worker."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    async def answer(self, values: Values) -> dict[str, Any]:
        """Answer the question `close`: close the connection. Return the number closed, 0 or 1."""
        connection = values.get("connection")
        if not isinstance(connection, str) or not connection:
            raise BadQuestion("connection must be the ID of a connection")
        async for session in in_slices(self._hub.sessions()):
            info = session.info
            if info is not None and info.id == connection and not session.closed:
                session.disconnect(Reason.DISCONNECTED)
                return {"closed": 1}
        return {"closed": 0}


async def close_connection(questions: Questions, connection: str) -> tuple[int, list[str]]:
    """Close the connection with this ID. Return whether it was found (1), and which workers have
    not answered."""
    answers = await questions.ask(CLOSE, {"connection": connection})
    closed = sum(int(each["closed"]) for each in answers.by_worker.values())
    return closed, [*answers.silent, *answers.failed]
