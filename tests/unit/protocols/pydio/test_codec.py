"""What a Pydio browser says and is told."""

from __future__ import annotations

import pytest

from relay.core.model import Channel, EntryID, Event
from relay.core.reasons import Reason
from relay.hub.encoding import frame
from relay.hub.recovery import Notice
from relay.protocols.pydio import codec
from relay.protocols.pydio.private_messages import PATHS
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


def test_an_event_is_its_data_and_nothing_else() -> None:
    data = "<tree>\n ü </tree>".encode()
    assert codec.VERBATIM.event(event(data)) == frame_text(data)


def test_every_notice_makes_the_page_read_again() -> None:
    for notice in (Notice("gap", Reason.TRIMMED), Notice("reset", Reason.FAILOVER)):
        assert codec.VERBATIM.notice(ONE, notice) == frame_text(codec.RELOAD_FOLDER)
    told = codec.VERBATIM.notice(ONE, Notice("revoked", Reason.REVOKED))
    assert told == frame_text(codec.RELOAD_WORKSPACES)


def test_a_mask_replaces_what_names_paths_in_its_workspace_only() -> None:
    masked = codec.encoder_for(frozenset({"1"}))
    assert codec.encoder_for(frozenset({"1"})) is masked
    assert codec.encoder_for(frozenset()) is codec.VERBATIM
    paths = {PATHS: b'["/a"]'}
    assert masked.event(event(b"x", paths)) == frame_text(codec.RELOAD_FOLDER)
    elsewhere = event(b"x", paths, Channel("pydio:2"))
    assert frame(masked, elsewhere) == frame_text(b"x")
    # The bytes are those of everybody else, not a copy.
    plain = event(b"x")
    assert frame(masked, plain) is frame(codec.VERBATIM, plain)
