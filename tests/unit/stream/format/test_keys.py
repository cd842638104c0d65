"""relay/stream/format/keys.py: key names, and the channel of a key."""

from __future__ import annotations

import fnmatch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core.model import Channel, parse_channel
from relay.stream.format.keys import Keys, escape, unescape

# Half of the characters are special ones.
_characters = st.sampled_from(" %{}:*\t\n\x00\x7f07BDF25aü") | st.characters(codec="utf-8")
channels = st.text(_characters, min_size=1, max_size=60).map(parse_channel)
prefixes = st.text(st.characters(exclude_characters="{} \t\n", codec="utf-8"), max_size=10)


@given(prefix=prefixes, channel=channels)
def test_a_stream_key_leads_back_to_its_channel(prefix: str, channel: Channel) -> None:
    keys = Keys(prefix)
    assert keys.channel_of_stream(keys.stream(channel)) == channel
    assert keys.channel_of_rights(keys.rights(channel)) == channel
    assert keys.channel_of_ephemeral(keys.ephemeral(channel)) == channel
    assert keys.channel_of_stream(keys.rights(channel)) is None


@given(name=channels)
def test_escaping_is_reversible_and_keeps_ordinary_names(name: Channel) -> None:
    text = escape(name)
    assert unescape(text) == name
    # No character that would change the hash slot, break a line or need quotes in a terminal.
    assert not any(char <= " " or char in "{}\x7f" for char in text)
    if not any(char <= " " or char in "{}%\x7f" for char in name):
        assert text == name


@given(one=channels, other=channels)
def test_two_names_never_share_a_key(one: Channel, other: Channel) -> None:
    keys = Keys("relay:")
    assert (keys.stream(one) == keys.stream(other)) == (one == other)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("ws-ü & co", "relay:stream:{ws-ü%20&%20co}"),
        ("a{b}\n", "relay:stream:{a%7Bb%7D%0A}"),
        ("100%", "relay:stream:{100%}"),
        ("100%20", "relay:stream:{100%2520}"),
        ("%7b%41", "relay:stream:{%7b%41}"),
    ],
)
def test_escaped_names(name: str, key: str) -> None:
    keys = Keys("relay:")
    assert keys.stream(parse_channel(name)) == key.encode()
    assert keys.channel_of_stream(key.encode()) == name


@given(text=st.text(_characters, min_size=1, max_size=30))
def test_a_key_that_is_not_escaped_as_ours_belongs_to_no_channel(text: str) -> None:
    keys = Keys("relay:")
    key = f"relay:stream:{{{text}}}".encode()
    channel = keys.channel_of_stream(key)
    assert channel is None or keys.stream(channel) == key


def test_foreign_keys_have_no_channel() -> None:
    keys = Keys("relay:")
    for key in (
        b"relay:stream:{}",
        b"relay:stream:{a b}",
        b"relay:stream:a",
        b"x",
        b"relay:strea",
        b"relay:stream:{\xff}",
        b"relay:stream:{a}b}",
        b"relay:stream:{%2541}",
    ):
        assert keys.channel_of_stream(key) is None


def test_wildcards_in_a_prefix_match_only_themselves() -> None:
    assert Keys("a*?[b]").stream_pattern == rb"a\*\?\[b\]stream:{*}"
    # Python's fnmatch has no backslash escapes, so only the plain prefix can be tested here.
    assert fnmatch.fnmatchcase("relay:stream:{x}", Keys("relay:").stream_pattern.decode())
