"""What a Pydio browser says and is told, as bytes and values; no I/O.

A browser is told the content of an event and nothing else: no envelope, no ID. What the relay has
to say itself is said in Pydio's own instructions, which its pages obey as they obey PHP's
(PydioApi, `parseXmlMessage`, 6.4.2 to 8.2.5).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from relay.core.model import Channel, Event
from relay.hub.encoding import SharedEncoder, frame
from relay.hub.recovery import Notice
from relay.protocols.pydio.private_messages import PATHS
from relay.transports.socket.websocket import frame_text

if TYPE_CHECKING:
    pass

# The page reads the folder that it shows again, from Pydio itself.
RELOAD_FOLDER = b'<tree><reload_instruction object="data" node="" file=""/></tree>'
# The page reads the user's workspaces again, and leaves the one that is gone.
RELOAD_WORKSPACES = b'<tree><reload_instruction object="repository_list"/></tree>'


@dataclass(frozen=True, slots=True)
class Register:
    """`register:ID`: from now on events of this workspace, in the place of any other."""

    repository: str


@dataclass(frozen=True, slots=True)
class Unregister:
    """`unregister:`, whatever follows: events of no workspace."""


def parse(text: bytes) -> Register | Unregister | None:
    """A browser's message; None for what phpws ignores as well (ws-server.php, `onMessage`)."""
    verb, colon, rest = text.decode().partition(":")
    if not colon:
        return None
    if verb == "register":
        return Register(rest)
    return Unregister() if verb == "unregister" else None


class Verbatim(SharedEncoder):
    """One text frame an event: its data as it is."""

    door = "pydio"

    def event(self, event: Event) -> bytes:
        """See `relay.hub.encoding.Encoder`."""
        return frame_text(event.data)

    def notice(self, channel: Channel, notice: Notice) -> bytes:
        """The instruction to read again what may have changed unseen."""
        del channel
        return frame_text(content_of(notice))


def content_of(notice: Notice) -> bytes:
    """A notice in Pydio's words."""
    return RELOAD_WORKSPACES if notice.kind == "revoked" else RELOAD_FOLDER


VERBATIM = Verbatim()
_RELOAD = frame_text(RELOAD_FOLDER)


class Masked(Verbatim):
    """The same for users who may see only some of the paths of a workspace.

    Which ones Pydio does not tell a websocket server, only that there are such masks (`hasMask`).
    So an event that names paths becomes the instruction to read the folder again, and what Pydio
    then shows is masked by itself: no name leaks.
    """

    def __init__(self, repositories: frozenset[str]) -> None:
        self._repositories = repositories

    def event(self, event: Event) -> bytes:
        """See `relay.hub.encoding.Encoder`."""
        return _RELOAD if hides(event, self._repositories) else frame(VERBATIM, event)


def hides(event: Event, masked: frozenset[str]) -> bool:
    """Whether an event may name what a user with masks on these workspaces must not see."""
    return PATHS in event.extra and event.channel.partition(":")[2] in masked


_masked: WeakValueDictionary[frozenset[str], Masked] = WeakValueDictionary()


def encoder_for(masked: frozenset[str]) -> Verbatim:
    """One object for all sessions whose masks are on the same workspaces."""
    if not masked:
        return VERBATIM
    encoder = _masked.get(masked)
    if encoder is None:
        encoder = _masked[masked] = Masked(masked)
    return encoder
