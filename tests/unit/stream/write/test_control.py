"""stream/write/control.py: decoding reverses encoding, and unknown commands are ignored."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core.model import Channel, EntryID
from relay.stream.write.control import (
    ControlCommand,
    DisconnectUser,
    DoorCommand,
    DropRights,
    SentCommand,
    UnsubscribeUser,
    decode,
    encode,
)

ID = EntryID(1, 0)
users = st.text(st.characters(codec="utf-8"))
channels = st.sampled_from([Channel("news"), Channel("team:ä")])


@given(
    st.builds(DisconnectUser, user=users, door=st.none() | users)
    | st.builds(UnsubscribeUser, channel=st.none() | channels, user=users, door=st.none() | users)
    | st.builds(DoorCommand, door=users, payload=users)
    | st.builds(DropRights, channel=st.none() | channels, user=st.none() | users)
)
def test_decode_gives_back_what_was_encoded(command: ControlCommand) -> None:
    assert decode(ID, encode(command)) == SentCommand(ID, command)


@pytest.mark.parametrize(
    "fields",
    [
        [],
        [b"command", b"dance"],
        [b"command", b"disconnect"],
        [b"command", b"disconnect", b"user", b"\xff"],
        [b"command", b"unsubscribe", b"channel", b"news"],
        [b"command", b"unsubscribe", b"user", b"anna", b"channel", b""],
        [b"command", b"disconnect", b"user", b"anna", b"channel", b"news"],
        [b"user"],
        [b"command", b"door", b"door", b"socketio"],
        [b"command", b"door", b"payload", b"{}"],
    ],
)
def test_what_is_not_understood_is_skipped_and_logged(
    fields: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    assert decode(ID, fields) is None
    assert "Ignored control entry 1-0" in caplog.text


def test_unknown_fields_are_ignored() -> None:
    fields = [b"command", b"disconnect", b"user", b"anna", b"since", b"2"]
    assert decode(ID, fields) == SentCommand(ID, DisconnectUser(user="anna"))
