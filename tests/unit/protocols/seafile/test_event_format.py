"""Bodies of `/events` and lines of `repo_update` (wire facts, sections 1, 2, 8)."""

from __future__ import annotations

import pytest

from relay.protocols.seafile.event_format import Invalid, SeafEvent, Unaddressed, read, read_line

A = "aaaaaaaa-0000-4000-8000-000000000000"
CHANNEL = f"seafile:{A}"


def test_repo_update() -> None:
    body = b'{"type":"repo-update","content":{"repo_id":"%s","commit_id":"cc"}}' % A.encode()
    content = b'{"repo_id":"%s","commit_id":"cc"}' % A.encode()
    assert read(body) == SeafEvent(CHANNEL, "repo-update", content, commit="cc")  # type: ignore[arg-type]


def test_content_keeps_its_bytes() -> None:
    content = b'{ "x":1.0, "REPO_ID":"r" ,"n":12345678901234567890,"x": [null]}'
    event = read(b' {"top":1,"Content": ' + content + b' ,"type":"any-word"}\n')
    assert event.content == content
    assert (event.channel, event.type) == ("seafile:r", "any-word")


def test_replaces_half_a_surrogate_pair() -> None:
    """Go does the same. Without it, the event could not be stored in Redis."""
    content = b'{"repo_id":"r\\ud800","commit_id":"c\\udc00x","user":"a\\ud83d\\ude00\\ud800"}'
    event = read(b'{"type":"repo-update","content":%b}' % content)
    assert event == SeafEvent("seafile:r\ufffd", "repo-update", content, commit="c\ufffdx")  # type: ignore[arg-type]
    event = read(b'{"type":"folder-perm-changed","content":%b}' % content)
    assert event.user == "a\U0001f600\ufffd"
    assert read(b'{"type":"x\\ud800","content":%b}' % content).type == "x\ufffd"
    line = b'{"msg_type":"repo-update","repo_id":"r","commit_id":"\\ud800"}'
    found = read_line(line)
    assert found is not None
    assert found.commit == "\ufffd"


@pytest.mark.parametrize(
    ("fields", "user", "group"),
    [
        ('"user":"alice","group":-1', "alice", None),
        ('"user":"alice","group":3', "alice", None),
        ('"user":"","group":3', "", 3),
        ('"group":3', "", 3),
        ('"user":"","group":-1', "", None),
        ('"user":""', "", 0),
        ('"user":null,"group":null', "", 0),
    ],
)
def test_recipients_of_a_permission(fields: str, user: str, group: int | None) -> None:
    event = read(f'{{"type":"folder-perm-changed","content":{{"repo_id":"r",{fields}}}}}'.encode())
    assert (event.user, event.group) == (user, group)


@pytest.mark.parametrize("fields", ['"user":1', '"group":"3"', '"group":1.5', '"group":true'])
def test_rejects_invalid_recipients(fields: str) -> None:
    with pytest.raises(Unaddressed):
        read(f'{{"type":"folder-perm-changed","content":{{"repo_id":"r",{fields}}}}}'.encode())


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not json",
        b"[]",
        b"null",
        b'"x"',
        b'{"type":1,"content":{}}',
        b'{"type":"x","content":{}} more',
        b'{"type":"x","content":{}}{}',
        b'{"type":"x","content":NaN}',
        b'{"type":"x",}',
        b"[" * 100_000,
    ],
)
def test_rejects_bodies_that_are_not_events(body: bytes) -> None:
    with pytest.raises(Invalid):
        read(body)


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b'{"type":"x"}',
        b'{"type":"x","content":null}',
        b'{"type":"x","content":[]}',
        b'{"type":"x","content":{}}',
        b'{"type":"x","content":{"repo_id":""}}',
        b'{"type":"x","content":{"repo_id":1}}',
        b'{"type":"x","content":{"repo_id":"%b"}}' % (b"x" * 256),
        b'{"type":"repo-update","content":{"repo_id":"r","commit_id":1}}',
    ],
)
def test_events_without_a_library_are_unaddressed(body: bytes) -> None:
    with pytest.raises(Unaddressed):
        read(body)


@pytest.mark.parametrize(
    "line",
    [
        f"repo-update\t{A}\tcc",
        f'{{"msg_type": "repo-update", "repo_id": "{A}", "commit_id": "cc"}}',
    ],
)
def test_reads_both_formats_of_repo_update(line: str) -> None:
    event = read_line(line.encode())
    content = b'{"repo_id":"%s","commit_id":"cc"}' % A.encode()
    assert event == SeafEvent(CHANNEL, "repo-update", content, commit="cc")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "line",
    ["repo-upload-sync\tu\tip\tc\tr\tp", '{"msg_type":"init-metadata","repo_id":"r"}', "", "x"],
)
def test_ignores_other_messages_of_repo_update(line: str) -> None:
    assert read_line(line.encode()) is None


@pytest.mark.parametrize(
    "line", ["repo-update\tr", "repo-update\t\tc", "{", '{"msg_type":"repo-update"}', "repo-update"]
)
def test_rejects_malformed_messages_of_repo_update(line: str) -> None:
    with pytest.raises(Unaddressed):
        read_line(line.encode())
