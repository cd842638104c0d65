"""The messages in the tables of the wire facts, byte for byte."""

from __future__ import annotations

import asyncio
import json

import pytest

from relay.core.model import Channel, EntryID, Event
from relay.protocols.seafile import codec
from relay.protocols.seafile.codec import (
    BadMessage,
    LibrarySubscribe,
    LibraryUnsubscribe,
    event_message,
    jwt_expired,
    message,
    parse,
)

A = "aaaaaaaa-0000-4000-8000-000000000000"


def test_parses_subscribe() -> None:
    text = b'{"type":"subscribe","content":{"repos":[{"id":"x","jwt_token":"t"},{"id":"y"}]}}'
    assert parse(text) == [LibrarySubscribe("x", "t", None), LibrarySubscribe("y", "", None)]


def test_parses_both_forms_of_unsubscribe() -> None:
    assert parse(b'{"type":"unsubscribe","content":{"repos":[{"id":"x"},"y"]}}') == [
        LibraryUnsubscribe("x"),
        LibraryUnsubscribe("y"),
    ]


@pytest.mark.parametrize(
    "text",
    [
        b'{"type":"subscribe","content":null}',
        b'{"type":"subscribe","content":{}}',
        b'{"type":"subscribe","content":{"repos":null}}',
        b'{"type":"unsubscribe","content":null}',
        b' \n{"type":"subscribe","content":{}} and bytes after it',
    ],
)
def test_tolerates_what_go_tolerates(text: bytes) -> None:
    assert parse(text) == []


def test_accepts_names_in_any_case() -> None:
    text = b'{"TYPE":"subscribe","Content":{"REPOS":[{"Id":"x","JWT_Token":"t"}]}}'
    assert parse(text) == [LibrarySubscribe("x", "t", None)]


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"no json",
        b"[]",
        b"{}",
        b"null",
        b'{"type":"hello","content":{}}',
        b'{"type":1,"content":{}}',
        b'{"type":"subscribe"}',
        b'{"type":"subscribe","content":[]}',
        b'{"type":"subscribe","content":"x"}',
        b'{"type":"subscribe","content":{"repos":{}}}',
        b'{"type":"subscribe","content":{"repos":["x"]}}',
        b'{"type":"subscribe","content":{"repos":[1]}}',
        b'{"type":"subscribe","content":{"repos":[{"id":1}]}}',
        b'{"type":"subscribe","content":{"repos":[{"id":"x","jwt_token":1}]}}',
        b'{"type":"subscribe","content":{"repos":[{"id":"x","after":"when"}]}}',
        b'{"type":"unsubscribe","content":{"repos":[1]}}',
        b'{"type":"subscribe","content":NaN}',
        b"[" * 100_000,
    ],
)
def test_rejects_malformed_messages(text: bytes) -> None:
    with pytest.raises(BadMessage):
        parse(text)


def test_parses_the_extension_after() -> None:
    text = b'{"type":"subscribe","content":{"repos":[{"id":"x","jwt_token":"t","after":"5-1"}]}}'
    assert parse(text) == [LibrarySubscribe("x", "t", EntryID(5, 1))]


@pytest.mark.parametrize(
    ("sent", "received"),
    [
        # Captures of notification-server 11.0 and 13.0.
        (b'{"repo_id":"a","commit_id":"c"}', b'{"repo_id":"a","commit_id":"c"}'),
        (b'{ "b" : 1 ,\n "a":[ 1 , 2 ], "b": 2 }', b'{"b":1,"a":[1,2],"b":2}'),
        (
            b'{"n":12345678901234567890,"f":1.0,"e":1E5}',
            b'{"n":12345678901234567890,"f":1.0,"e":1E5}',
        ),
        (b'{"p":"a < b && c > d"}', b'{"p":"a \\u003c b \\u0026\\u0026 c \\u003e d"}'),
        (b'{"p":"a \\" b \\\\"}', b'{"p":"a \\" b \\\\"}'),
        ('{"p":"ä\u2028ü"}'.encode(), '{"p":"ä\\u2028ü"}'.encode()),
    ],
)
def test_keeps_the_content(sent: bytes, received: bytes) -> None:
    assert message("repo-update", sent) == b'{"type":"repo-update","content":%s}\n' % received


def test_ignores_events_that_are_not_part_of_the_protocol() -> None:
    event = Event(Channel("seafile:x"), EntryID(1, 0), b'say "hi"', is_json=False)
    assert event_message(event) == b""


def test_jwt_expired_is_one_frame() -> None:
    text = b'{"type":"jwt-expired","content":{"repo_id":"%s"}}\n' % A.encode()
    assert jwt_expired(A) == bytes((0x81, len(text))) + text


async def _in_parts(text: bytes) -> list[codec.LibrarySubscribe | codec.LibraryUnsubscribe]:
    found: list[codec.LibrarySubscribe | codec.LibraryUnsubscribe] = []
    async for part in codec.parts(text):
        found += codec.parse(part)
    return found


@pytest.mark.parametrize("kind", ["subscribe", "unsubscribe"])
def test_the_parts_of_a_long_message_have_the_same_libraries(kind: str) -> None:
    repos = [{"id": f"{number:036}", "jwt_token": "x" * 300} for number in range(1000)]
    for content in ({"repos": repos}, {"repos": repos, "other": [1, 2]}):
        for whole in ({"type": kind, "content": content}, {"content": content, "type": kind}):
            text = json.dumps(whole).encode()
            assert asyncio.run(_in_parts(text)) == codec.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 100_000,
        b'{"type":"subscribe","content":{"repos":[' + b"1," * 100_000 + b"1]}}",
        b'{"type":"subscribe","content":{"repos":[[' + b"1," * 100_000 + b"1]]}}",
        b'{"type":"subscribe","content":{"repos":[]},"more":[' + b"1," * 100_000 + b"1]}",
        b'{"type":"subscribe","content":{"repos":[{}' + b",{}" * 100_000,
        b'"' * 100_000,
    ],
)
def test_rejects_malformed_long_messages(text: bytes) -> None:
    with pytest.raises(codec.BadMessage):
        asyncio.run(_in_parts(text))
