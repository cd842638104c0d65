"""Event blocks, read back by a parser written from the standard."""

from __future__ import annotations

import asyncio
import re

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from relay.transports.socket import sse
from relay.transports.socket.reaper import Reaper
from relay.transports.socket.take_over import take_over
from tests.unit.transports.serving import GET, Run, head_of, raw_client, serving


def parse(stream: str) -> list[tuple[str, str, str]]:
    """WHATWG HTML 9.2.6 "Interpreting an event stream": (type, data, last event ID) of each."""
    events = []
    name, data, last_id = "", "", ""
    for line in re.split(r"\r\n|\n|\r", stream)[:-1]:
        if not line:
            if data:
                events.append((name or "message", data[:-1], last_id))
            name, data = "", ""
            continue
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "event":
            name = value
        elif field == "data":
            data += value + "\n"
        elif field == "id" and "\0" not in value:
            last_id = value
    return events


def test_blocks_as_bytes() -> None:
    assert sse.block(b"hello") == b"data: hello\n\n"
    assert sse.block(b"a\r\nb\rc\nd\n", id=b"1-2", event=b"tick") == (
        b"id: 1-2\nevent: tick\ndata: a\ndata: b\ndata: c\ndata: d\ndata: \n\n"
    )
    assert sse.id_only(b"1-2") == b"id: 1-2\n\n"
    assert sse.retry(2500) == b"retry: 2500\n\n"


@given(
    items=st.lists(
        st.tuples(
            st.text(),
            st.none() | st.text(st.characters(exclude_characters="\r\n\0", codec="utf-8")),
            st.none()
            | st.text(st.characters(exclude_characters="\r\n", codec="utf-8"), min_size=1),
        )
    )
)
def test_a_client_reads_back_what_was_written(
    items: list[tuple[str, str | None, str | None]],
) -> None:
    stream, expected, last_id = b"", [], ""
    for data, event_id, name in items:
        stream += sse.block(
            data.encode(),
            id=None if event_id is None else event_id.encode(),
            event=None if name is None else name.encode(),
        )
        last_id = last_id if event_id is None else event_id
        expected.append((name or "message", re.sub(r"\r\n|\r", "\n", data), last_id))
    assert parse(stream.decode()) == expected


@pytest.mark.parametrize("bad", [b"a\nb", b"a\rb", b"\0"])
def test_an_id_that_clients_would_misread_is_refused(bad: bytes) -> None:
    with pytest.raises(ValueError, match="ID"):
        sse.block(b"", id=bad)
    with pytest.raises(ValueError, match="ID"):
        sse.id_only(bad)


def test_a_name_or_a_header_with_a_line_break_is_refused() -> None:
    with pytest.raises(ValueError, match="name"):
        sse.block(b"", event=b"a\nid: 5")
    with pytest.raises(ValueError, match="header"):
        sse.head({"X-A": "b\r\nX-C: d"})


def test_the_head_promises_an_unbuffered_stream_until_the_end() -> None:
    head = sse.head({"Access-Control-Allow-Origin": "https://a.example"})
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert head.endswith(b"\r\n\r\n")
    for line in (
        b"Content-Type: text/event-stream",
        b"Cache-Control: no-store",
        b"X-Accel-Buffering: no",
        b"Connection: close",
        b"Access-Control-Allow-Origin: https://a.example",
    ):
        assert line in head.split(b"\r\n")
    assert b"chunked" not in head.lower()


def test_a_client_that_keeps_talking_is_cut(run: Run, reaper: Reaper) -> None:
    async def main() -> None:
        closed = asyncio.Event()

        async def handler(request: web.Request) -> web.StreamResponse:
            client = sse.SseConnection(buffer_bytes=65536, reaper=reaper)
            client.on_closed = closed.set
            return take_over(request, sse.head(), client)

        async with (
            serving(handler) as (port, _),
            raw_client(port, GET) as (reader, writer),
        ):
            await head_of(reader)
            writer.write(b"x" * 60_000)
            for _ in range(10):
                await asyncio.sleep(0)
            assert not closed.is_set()
            writer.write(b"x" * 10_000)
            await closed.wait()

    run(main())
