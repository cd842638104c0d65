"""Messages between a Pydio browser and relay, as bytes and values.

A browser receives the content of an event without an envelope or ID. Notices of relay are sent as
Pydio's own instructions, which its pages apply like PHP's (PydioApi, `parseXmlMessage`, 6.4.2 to
8.2.5).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from typing_extensions import override

from relay.hub.encoding import SharedEncoder, frame
from relay.protocols.pydio.private_messages import PATHS_FIELD
from relay.transports.socket.websocket import frame_text

if TYPE_CHECKING:
    from relay.core.model import Channel, Event
    from relay.hub.recovery import Notice

# The page reads the folder that it shows from Pydio again.
RELOAD_FOLDER = b'<tree><reload_instruction object="data" node="" file=""/></tree>'
# The page reads the user's workspaces again, and leaves one that no longer exists.
RELOAD_WORKSPACES = b'<tree><reload_instruction object="repository_list"/></tree>'


@dataclass(frozen=True, slots=True)
class Register:
    """`register:ID`: receive events of this workspace, and of no other."""

    repository: str


@dataclass(frozen=True, slots=True)
class Unregister:
    """`unregister:` with any text after it: receive events of no workspace."""


def parse(text: bytes) -> Register | Unregister | None:
    """Parse a browser's message. Return None for messages that phpws ignores.

    Source: ws-server.php, `onMessage`.
    """
    verb, colon, rest = text.decode().partition(":")
    if not colon:
        return None
    if verb == "register":
        return Register(rest)
    return Unregister() if verb == "unregister" else None


class ContentEncoder(SharedEncoder):
    """Encodes an event as one text frame with its unchanged data."""

    door = "pydio"

    @override
    def event(self, event: Event) -> bytes:
        return frame_text(event.data)

    @override
    def notice(self, channel: Channel, notice: Notice) -> bytes:
        del channel
        return frame_text(content_of(notice))


def content_of(notice: Notice) -> bytes:
    """Return the instruction to read again what may have changed."""
    return RELOAD_WORKSPACES if notice.kind == "revoked" else RELOAD_FOLDER


CONTENT_ENCODER = ContentEncoder()
_RELOAD = frame_text(RELOAD_FOLDER)


class MaskedEncoder(ContentEncoder):
    """The format for users with path masks on certain workspaces.

    A websocket server receives from Pydio only whether a workspace has such masks (`hasMask`), not
    which paths they hide. An event with paths is therefore replaced by the instruction to read the
    folder again. Pydio masks its response, so that no hidden name is shown.
    """

    def __init__(self, repositories: frozenset[str]) -> None:
        self._repositories = repositories

    @override
    def event(self, event: Event) -> bytes:
        if needs_masking(event, self._repositories):
            return _RELOAD
        return frame(CONTENT_ENCODER, event)


def needs_masking(event: Event, masked: frozenset[str]) -> bool:
    """Return True if the event may contain paths that masks on these workspaces hide."""
    return PATHS_FIELD in event.extra and event.channel.partition(":")[2] in masked


_masked: WeakValueDictionary[frozenset[str], MaskedEncoder] = WeakValueDictionary()


def encoder_for(masked: frozenset[str]) -> ContentEncoder:
    """Return the encoder that all users with masks on these workspaces share."""
    if not masked:
        return CONTENT_ENCODER
    encoder = _masked.get(masked)
    if encoder is None:
        encoder = _masked[masked] = MaskedEncoder(masked)
    return encoder
