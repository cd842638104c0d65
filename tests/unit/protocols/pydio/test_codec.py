"""Messages between a Pydio browser and relay."""

from __future__ import annotations

import pytest

from relay.core.model import Channel, EntryID, Event
from relay.core.reasons import Reason
from relay.hub.encoding import frame
from relay.hub.recovery import Notice
from relay.protocols.pydio import codec
from relay.protocols.pydio.private_messages import PATHS_FIELD
from relay.transports.socket.websocket import frame_text

ONE = Channel("pydio:1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"register:1", codec.Register("1")),
        (b"register: 9f2ab ", codec.Register(" 9f2ab ")),
        (b"register:a:b", codec.Register("a:b")),
        (b"register:", codec.Register("")),
        (b"unregister:", codec.Unregister()),
        (b"unregister:1", codec.Unregister()),
        (b"unregister", None),
        (b"Register:1", None),
        (b"", None),
        ("grüße".encode(), None),
    ],
)
def test_a_browsers_messages(text: bytes, message: object) -> None:
    assert codec.parse(text) == message


def event(data: bytes, extra: dict[bytes, bytes] | None = None, channel: Channel = ONE) -> Event:
    return Event(channel, EntryID(1, 0), data, is_json=False, extra=extra or {})


def test_an_event_is_sent_as_its_data() -> None:
    data = "<tree>\n ü </tree>".encode()
    assert codec.CONTENT_ENCODER.event(event(data)) == frame_text(data)


def test_notices_instruct_the_page_to_reload() -> None:
    for notice in (Notice("gap", Reason.TRIMMED), Notice("reset", Reason.FAILOVER)):
        assert codec.CONTENT_ENCODER.notice(ONE, notice) == frame_text(codec.RELOAD_FOLDER)
    revoked = codec.CONTENT_ENCODER.notice(ONE, Notice("revoked", Reason.REVOKED))
    assert revoked == frame_text(codec.RELOAD_WORKSPACES)


def test_a_mask_replaces_events_with_paths_in_its_workspace_only() -> None:
    masked = codec.encoder_for(frozenset({"1"}))
    assert codec.encoder_for(frozenset({"1"})) is masked
    assert codec.encoder_for(frozenset()) is codec.CONTENT_ENCODER
    paths = {PATHS_FIELD: b'["/a"]'}
    assert masked.event(event(b"x", paths)) == frame_text(codec.RELOAD_FOLDER)
    elsewhere = event(b"x", paths, Channel("pydio:2"))
    assert frame(masked, elsewhere) == frame_text(b"x")
    # Without paths the frame is shared with all other clients.
    plain = event(b"x")
    assert frame(masked, plain) is frame(codec.CONTENT_ENCODER, plain)
