"""relay/stream/keys.py: names, and the way back from a name to its channel."""

from __future__ import annotations

import fnmatch

from hypothesis import given
from hypothesis import strategies as st

from relay.model import Channel, EntryID, parse_channel
from relay.stream.keys import Keys


def _is_channel(text: str) -> bool:
    try:
        parse_channel(text)
        text.encode()
    except ValueError:
        return False
    return True


channels = st.text(min_size=1, max_size=60).filter(_is_channel).map(Channel)
prefixes = st.text(st.characters(exclude_characters="{} \t\n", codec="utf-8"), max_size=10)


@given(prefix=prefixes, channel=channels)
def test_a_stream_key_leads_back_to_its_channel(prefix: str, channel: Channel) -> None:
    keys = Keys(prefix)
    assert keys.channel_of_stream(keys.stream(channel)) == channel
    assert keys.channel_of_rights(keys.rights(channel)) == channel
    assert keys.channel_of_ephemeral(keys.ephemeral(channel)) == channel
    assert keys.channel_of_stream(keys.rights(channel)) is None


def test_names() -> None:
    keys = Keys("relay:")
    news = Channel("team:news")
    assert keys.stream(news) == b"relay:stream:{team:news}"
    assert keys.rights(news) == b"relay:rights:{team:news}"
    assert keys.ephemeral(news) == b"relay:ephemeral:{team:news}"
    assert keys.dead_letter_mark(news, EntryID(5, 1)) == b"relay:dead-letter:{team:news}:5-1"
    assert (keys.control, keys.dead_letters) == (b"relay:control", b"relay:dead-letters")
    assert (keys.nodes, keys.node("a:1")) == (b"relay:nodes", b"relay:node:a:1")
    assert keys.takers == b"relay:takers"
    assert (keys.canary("a:1"), keys.lease("trim")) == (b"relay:canary:a:1", b"relay:lease:trim")


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
    ):
        assert keys.channel_of_stream(key) is None


def test_wildcards_in_a_prefix_match_only_themselves() -> None:
    assert Keys("a*?[b]").stream_pattern == rb"a\*\?\[b\]stream:{*}"
    # Python's fnmatch has no backslash escapes, so only the plain prefix can be tried here.
    assert fnmatch.fnmatchcase("relay:stream:{x}", Keys("relay:").stream_pattern.decode())
