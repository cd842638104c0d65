"""Every route and error of sockjs-protocol, on one worker and over two."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from dataclasses import replace

import pytest
from aiohttp import ClientError, ClientResponse, WSMsgType

from relay.transports.sockjs.frames import element
from tests.support.sockjs import OPTIONS
from tests.unit.transports.sockjs.conftest import RunSite, Site

NO_CACHE = "no-store, no-cache, no-transform, must-revalidate, max-age=0"
FORM = "application/x-www-form-urlencoded"


async def line(response: ClientResponse) -> bytes:
    return await response.content.readuntil(b"\n")


# ---- static -------------------------------------------------------------------------------------


def test_the_greeting_and_unknown_paths(on_site: RunSite) -> None:
    async def main(site: Site) -> None:
        async with site.request("GET", "/echo/") as answer:
            assert answer.status == 200
            assert answer.headers["Content-Type"] == "text/plain; charset=UTF-8"
            assert await answer.read() == b"Welcome to SockJS!\n"
        async with site.request("GET", "/echo?a=b") as answer:
            assert (answer.status, answer.headers["Location"]) == (301, "/echo/?a=b")
        for suffix in ("/a", "/a.html", "//", "///", "/a/a", "/a/a/", "/a/", "/a/a/nothing"):
            assert (await site.fetch("GET", "/echo" + suffix))[0] == 404

    on_site(main)


def test_info_allows_every_origin_and_is_not_cached(on_site: RunSite) -> None:
    async def main(site: Site) -> None:
        entropy = set()
        for _ in range(2):
            async with site.request("GET", "/echo/info", Origin="http://a.example") as answer:
                assert answer.status == 200
                assert answer.headers["Content-Type"] == "application/json; charset=UTF-8"
                assert answer.headers["Cache-Control"] == NO_CACHE
                assert answer.headers["Access-Control-Allow-Origin"] == "http://a.example"
                assert answer.headers["Access-Control-Allow-Credentials"] == "true"
                found = json.loads(await answer.read())
                assert list(found) == ["websocket", "cookie_needed", "origins", "entropy"]
                entropy.add(found.pop("entropy"))
                assert found == {"websocket": True, "cookie_needed": False, "origins": ["*:*"]}
        assert len(entropy) == 2
        assert all(0 <= each < 2**32 for each in entropy)
        async with site.request("GET", "/echo/info") as answer:
            assert answer.headers["Access-Control-Allow-Origin"] == "*"
            assert "Access-Control-Allow-Credentials" not in answer.headers
        async with site.request("GET", "/echo/info", Origin="null") as answer:
            assert answer.headers["Access-Control-Allow-Origin"] == "null"

    on_site(main)


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/info", "GET"),
        ("/a/b/xhr", "POST"),
        ("/a/b/xhr_send", "POST"),
        ("/a/b/xhr_streaming", "POST"),
    ],
)
def test_a_preflight_response_is_cached_for_a_year(
    on_site: RunSite, path: str, methods: str
) -> None:
    async def main(site: Site) -> None:
        for wanted in ("a, b, c", ""):
            async with site.request(
                "OPTIONS",
                "/echo" + path,
                Origin="http://a.example",
                Access_Control_Request_Method=methods,
                Access_Control_Request_Headers=wanted,
            ) as answer:
                assert (answer.status, await answer.read()) == (204, b"")
                assert answer.headers["Cache-Control"] == "public, max-age=31536000"
                assert answer.headers["Expires"]
                assert answer.headers["Access-Control-Max-Age"] == "31536000"
                assert answer.headers["Access-Control-Allow-Methods"] == f"OPTIONS, {methods}"
                assert answer.headers["Access-Control-Allow-Origin"] == "http://a.example"
                assert answer.headers.get("Access-Control-Allow-Headers", "") == wanted
        assert not site.door.sessions

    on_site(main)


def test_the_iframe_page_is_cached_for_a_year(on_site: RunSite) -> None:
    async def main(site: Site) -> None:
        tag = ""
        for name in ("iframe", "iframe-a", "iframe-", "iframe-0.1.2abc-dirty.2144"):
            async with site.request("GET", f"/echo/{name}.html?t=1") as answer:
                assert answer.status == 200
                assert answer.headers["Content-Type"] == "text/html; charset=UTF-8"
                assert answer.headers["Cache-Control"] == "public, max-age=31536000"
                assert answer.headers["Expires"]
                assert "Last-Modified" not in answer.headers
                page = await answer.text()
                assert '<script src="/a&quot;b.js"></script>' in page
                assert "SockJS.bootstrap_iframe()" in page
                tag = answer.headers["ETag"]
        assert re.fullmatch('"[0-9a-f]{32}"', tag)
        for known in (tag, f'"x", W/{tag}'):
            async with site.request("GET", "/echo/iframe.html", If_None_Match=known) as answer:
                assert (answer.status, await answer.read()) == (304, b"")
                assert "Content-Type" not in answer.headers
        for name in ("iframe.htm", "iframe", "IFRAME.HTML", "iframe.xml", "iframe-/.html"):
            assert (await site.fetch("GET", "/echo/" + name))[0] == 404

    on_site(main, replace(OPTIONS, sockjs_url='/a"b.js'))


def test_another_method_is_not_allowed(on_site: RunSite) -> None:
    async def main(site: Site) -> None:
        wanted = {
            "/": "GET",
            "/info": "OPTIONS, GET",
            "/iframe.html": "GET",
            "/a/b/xhr": "OPTIONS, POST",
            "/a/b/xhr_send": "OPTIONS, POST",
            "/a/b/xhr_streaming": "OPTIONS, POST",
            "/a/b/jsonp_send": "POST",
            "/a/b/jsonp": "GET",
            "/a/b/eventsource": "GET",
            "/a/b/htmlfile": "GET",
            "/a/b/websocket": "GET",
        }
        for path, allowed in wanted.items():
            for method in {"GET", "POST", "PUT", "DELETE"} - set(allowed.split(", ")):
                async with site.request(method, "/echo" + path) as answer:
                    assert (answer.status, await answer.read()) == (405, b"")
                    assert answer.headers["Allow"] == allowed
                    assert "Content-Type" not in answer.headers

    on_site(main)


# ---- sessions -----------------------------------------------------------------------------------


def test_any_session_name_except_empty_and_dotted_ones(on_site: RunSite) -> None:
    async def main(site: Site) -> None:
        for names in ("/a/a", "/_/_", "/1/", "/abcdefgh_i-j%20/abcdefg_i-j%20", "/x/%C3%A9%FF"):
            path = names if names != "/1/" else "/1/1"
            assert await site.post(f"/echo{path}/xhr") == b"o\n"
        for names in ("//", "/a./a", "/a/a.", "/./.", "/", "///"):
            assert (await site.fetch("POST", f"/echo{names}/xhr"))[0] == 404

    on_site(main)


def test_the_server_part_of_the_path_is_ignored(on_site: RunSite) -> None:
    async def main(site: Site) -> None:
        assert await site.post("/echo/000/same/xhr") == b"o\n"
        await site.send("/echo/000/same", "a")
        assert await site.post("/echo/999/same/xhr") == b'a["a"]\n'

    on_site(main)


def test_xhr(on_site: RunSite) -> None:
    async def main(site: Site) -> None:
        session = site.session()
        async with site.request("POST", session + "/xhr", Origin="http://a") as answer:
            assert (answer.status, await answer.read()) == (200, b"o\n")
            assert answer.headers["Content-Type"] == "application/javascript; charset=UTF-8"
            assert answer.headers["Cache-Control"] == NO_CACHE
            assert answer.headers["Access-Control-Allow-Origin"] == "http://a"
        async with site.request(
            "POST", session + "/xhr_send", b'["x","y"]', Origin="http://a"
        ) as answer:
            assert (answer.status, await answer.read()) == (204, b"")
            assert answer.headers["Content-Type"] == "text/plain; charset=UTF-8"
            assert answer.headers["Access-Control-Allow-Origin"] == "http://a"
            assert answer.headers["Cache-Control"] == NO_CACHE
        # Messages that arrive between two polls are sent together.
        assert await site.post(session + "/xhr") == b'a["x","y"]\n'
        # A message that arrives while a poll waits is sent at once.
        poll = asyncio.create_task(site.post(session + "/xhr"))  # noqa: TID251 - awaited below
        await site.send(session)
        await site.send(session, "z")
        assert await poll == b'a["z"]\n'
        assert len(site.door.sessions) == 1
        assert not site.doors[1].sessions

    on_site(main)


def test_messages_for_an_unknown_session(on_site: RunSite) -> None:
    async def main(site: Site) -> None:
        for path in ("xhr_send", "jsonp_send"):
            for _ in range(2):
                async with site.request(
                    "POST", f"/echo/0/no/{path}", b'["x"]', Origin="http://a"
                ) as answer:
                    assert answer.status == 404
                    assert answer.headers["Access-Control-Allow-Origin"] == "http://a"

    on_site(main)


def test_malformed_messages_do_not_affect_the_session(on_site: RunSite) -> None:
    async def main(site: Site) -> None:
        session = site.session()
        assert await site.post(session + "/xhr") == b"o\n"
        for _ in range(2):
            for body, text in ((b'["x', b"Broken JSON encoding."), (b"", b"Payload expected.")):
                assert await site.fetch("POST", session + "/xhr_send", body) == (500, text)
            for body in (b"d=%5B%22x", b"d=", b"p=p"):
                text = b"Broken JSON encoding." if b"x" in body else b"Payload expected."
                answer = await site.fetch("POST", session + "/jsonp_send", body, Content_Type=FORM)
                assert answer == (500, text)
        for kind in ("text/plain", "T", "application/json", "", "text/xml; charset=utf-8"):
            assert (await site.fetch("POST", session + "/xhr_send", b'["a"]', Content_Type=kind))[
                0
            ] == 204
        assert await site.post(session + "/xhr") == b'a["a","a","a","a","a"]\n'

    on_site(main)


def test_xhr_streaming(on_site: RunSite) -> None:
    async def main(site: Site) -> None:
        session = site.session()
        async with site.request("POST", session + "/xhr_streaming", Origin="http://a") as answer:
            assert answer.headers["Content-Type"] == "application/javascript; charset=UTF-8"
            assert answer.headers["Cache-Control"] == NO_CACHE
            assert answer.headers["Access-Control-Allow-Origin"] == "http://a"
            assert answer.headers["X-Accel-Buffering"] == "no"
            assert await line(answer) == b"h" * 2048 + b"\n"
            assert await line(answer) == b"o\n"
            for _ in range(3):
                await site.send(session, "x")
                assert await line(answer) == b'a["x"]\n'

    on_site(main)


def test_eventsource(on_site: RunSite) -> None:
    async def main(site: Site) -> None:
        session = site.session()
        async with site.request("GET", session + "/eventsource") as answer:
            assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
            assert answer.headers["Cache-Control"] == NO_CACHE
            assert await answer.content.readexactly(2) == b"\r\n"
            assert await answer.content.readuntil(b"\r\n\r\n") == b"data: o\r\n\r\n"
            await site.send(session, r"  \u0000\n\r 100% %41")
            frame = await answer.content.readuntil(b"\r\n\r\n")
            # The client un-escapes what it receives.
            assert frame == rb'data: a["  \u0000\n\r 100%25 %2541"]' + b"\r\n\r\n"

    on_site(main)


def test_htmlfile(on_site: RunSite) -> None:
    async def main(site: Site) -> None:
        session = site.session()
        async with site.request("GET", session + "/htmlfile?c=_jp.%63all_1") as answer:
            assert answer.headers["Content-Type"] == "text/html; charset=UTF-8"
            assert answer.headers["Cache-Control"] == NO_CACHE
            page = await answer.content.readuntil(b"\r\n\r\n")
            assert len(page) > 1024
            assert b"var c = parent._jp.call_1;" in page
            assert await answer.content.readuntil(b"\r\n") == b'<script>\np("o");\n</script>\r\n'
            await site.send(session, "</script>")
            frame = await answer.content.readuntil(b"\r\n")
            assert frame == b'<script>\np("a[\\"\\u003c/script\\u003e\\"]");\n</script>\r\n'

    on_site(main)


def test_jsonp(on_site: RunSite) -> None:
    async def main(site: Site) -> None:
        session = site.session()
        async with site.request("GET", session + "/jsonp?c=%63allback") as answer:
            assert answer.headers["Content-Type"] == "application/javascript; charset=UTF-8"
            assert answer.headers["Cache-Control"] == NO_CACHE
            assert await answer.read() == b'/**/callback("o");\r\n'
        async with site.request(
            "POST", session + "/jsonp_send", b"d=%5B%22%C3%A9+x%22%5D", Content_Type=FORM
        ) as answer:
            assert (answer.status, await answer.read()) == (200, b"ok")
            assert answer.headers["Content-Type"] == "text/plain; charset=UTF-8"
            assert answer.headers["Cache-Control"] == NO_CACHE
        assert await site.post(session + "/jsonp_send", b'["%61bc"]') == b"ok"
        wanted = '/**/x("a[\\"é x\\",\\"%61bc\\"]");\r\n'
        assert await site.get(session + "/jsonp?c=x") == wanted.encode()

    on_site(main)


@pytest.mark.parametrize("transport", ["jsonp", "htmlfile"])
def test_a_callback_must_be_a_name(on_site: RunSite, transport: str) -> None:
    async def main(site: Site) -> None:
        path = f"/echo/a/a/{transport}"
        for query in ("", "?c="):
            answer = await site.fetch("GET", path + query)
            assert answer == (500, b'"callback" parameter required\n')
        for bad in ("%20", "*", "abc(", "abc%28", "a-b", "%C3%A9", "a%0Ab"):
            answer = await site.fetch("GET", f"{path}?c={bad}")
            assert answer == (400, b'invalid character in "callback" parameter\n')
        assert not site.door.sessions

    on_site(main)


# ---- one receiver at a time ---------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["xhr", "xhr_streaming"])
def test_a_second_receiver_is_rejected(on_site: RunSite, transport: str) -> None:
    async def main(site: Site) -> None:
        session = site.session()
        assert await site.post(session + "/xhr") == b"o\n"
        async with asyncio.TaskGroup() as tasks:
            first = tasks.create_task(site.post(session + "/xhr"))
            while not site.door.sessions[0]._receiver:
                await asyncio.sleep(0)
            body = await site.post(session + "/" + transport)
            assert body.removeprefix(b"h" * 2048 + b"\n") == (
                b'c[2010,"Another connection still open"]\n'
            )
            # The first receiver continues.
            await site.send(session, "still here")
            assert await first == b'a["still here"]\n'

    on_site(main)


@pytest.mark.parametrize("transport", ["xhr", "xhr_streaming"])
def test_an_aborted_receiver_closes_the_session(on_site: RunSite, transport: str) -> None:
    async def main(site: Site) -> None:
        session = site.session()
        assert await site.post(session + "/xhr") == b"o\n"
        first = asyncio.create_task(site.post(f"{session}/{transport}"))  # noqa: TID251 - cancelled below
        while not site.door.sessions[0]._receiver:
            await asyncio.sleep(0)
        first.cancel()
        await site.door.until_closed(1)
        assert await site.post(session + "/xhr") == b"o\n"
        assert len(site.doors[0].sessions + site.doors[1].sessions) == 2

    on_site(main)


def test_a_session_without_a_receiver_times_out(on_site: RunSite) -> None:
    async def main(site: Site) -> None:
        session = site.session()
        assert await site.post(session + "/xhr") == b"o\n"
        await site.door.until_closed(1)
        assert (await site.fetch("POST", session + "/xhr_send", b'["x"]'))[0] == 404
        assert not len(site.door.echo)
        while site.store.values:
            await asyncio.sleep(0)

    on_site(main, replace(OPTIONS, disconnect_s=0.2))


def test_a_waiting_poll_keeps_the_session_and_gets_a_heartbeat(on_site: RunSite) -> None:
    async def main(site: Site) -> None:
        session = site.session()
        assert await site.post(session + "/xhr") == b"o\n"
        assert await site.post(session + "/xhr") == b"h\n"
        assert await site.get(session + "/jsonp?c=x") == b'/**/x("h");\r\n'
        assert site.door.closed == 0

    on_site(main, replace(OPTIONS, disconnect_s=0.5, heartbeat_s=0.7))


def test_streams_and_websockets_have_heartbeats(on_site: RunSite) -> None:
    async def main(site: Site) -> None:
        async with site.request(
            "POST", site.session() + "/xhr_streaming", Origin="http://a"
        ) as answer:
            await line(answer)
            assert [await line(answer) for _ in range(3)] == [b"o\n", b"h\n", b"h\n"]
        async with site.request("GET", site.session() + "/eventsource") as answer:
            await answer.content.readexactly(2)
            found = await answer.content.readexactly(22)
            assert found == b"data: o\r\n\r\ndata: h\r\n\r\n"
        async with site.http.ws_connect(site.url(site.session() + "/websocket")) as socket:
            assert [(await socket.receive()).data for _ in range(3)] == ["o", "h", "h"]

    on_site(main, replace(OPTIONS, heartbeat_s=0.1))


# ---- limits -------------------------------------------------------------------------------------


def test_a_stream_ends_at_its_limit_and_the_session_continues(on_site: RunSite) -> None:
    async def main(site: Site) -> None:
        session = site.session()
        message = "x" * 128
        async with site.request("POST", session + "/xhr_streaming", Origin="http://a") as answer:
            await line(answer)
            assert await line(answer) == b"o\n"
            for _ in range(30):
                await site.send(session, message)
                assert await line(answer) == f'a["{message}"]\n'.encode()
            await site.send(session, message)
            # The response is filled up to its declared length.
            rest = await answer.content.read()
            assert rest == b"h" * (len(rest) - 1) + b"\n"
        await site.send(session, "between")
        async with site.request("POST", session + "/xhr_streaming", Origin="http://a") as answer:
            await line(answer)
            assert await line(answer) == f'a["{message}","between"]\n'.encode()
        for method, path, end in (
            ("GET", "/eventsource", b"\r\n\r\n"),
            ("GET", "/htmlfile?c=x", b"</script>\r\n"),
            # Without Origin: sockjs-client in Node.
            ("POST", "/xhr_streaming", b"]\n"),
        ):
            # A client that cannot detect an incomplete response keeps its response.
            session = site.session()
            async with site.request(method, session + path) as answer:
                for _ in range(3):
                    await site.send(session, "y" * 4096)
                    while b"y" * 4096 not in await answer.content.readuntil(end):
                        pass

    on_site(main)


def test_a_long_frame_gets_a_response_with_enough_room(on_site: RunSite) -> None:
    async def main(site: Site) -> None:
        path = site.session()
        async with site.request("POST", path + "/xhr_streaming", Origin="http://a") as answer:
            await line(answer)
            assert await line(answer) == b"o\n"
            session = site.door.sessions[0]
            session.write(element(b"x" * 10_000))
            rest = await answer.content.read()
            assert rest.strip(b"h\n") == b""
            assert answer.content.total_bytes == 4096 + 2049
            assert session.full
        async with site.request("POST", path + "/xhr_streaming", Origin="http://a") as answer:
            await line(answer)
            assert await line(answer) == b'a["' + b"x" * 10_000 + b'"]\n'
            # Only a few bytes of the response are left.
            session.write(element(b"y" * 100))
            assert (await answer.content.read()).strip(b"h\n") == b""
        assert await site.post(path + "/xhr") == b'a["' + b"y" * 100 + b'"]\n'
        assert not session.full

    on_site(main, replace(OPTIONS, buffer_bytes=5000))


def test_the_buffer_of_a_polling_session_is_bounded_without_loss(on_site: RunSite) -> None:
    async def main(site: Site) -> None:
        path = site.session()
        assert await site.post(path + "/xhr") == b"o\n"
        (session,) = site.door.sessions
        told: list[str] = []
        session.on_full = lambda: told.append("full")
        session.on_drained = lambda: told.append("drained")
        session.write(b',"' + b"x" * 500 + b'"')
        assert (session.full, told) == (False, [])
        session.write(b',"' + b"y" * 500 + b'"')
        session.write(b',"z"')
        assert (session.full, told) == (True, ["full"])
        assert session.waiting_bytes() > 1000
        assert await site.post(path + "/xhr") == (
            b'a["' + b"x" * 500 + b'","' + b"y" * 500 + b'","z"]\n'
        )
        assert (session.full, told, session.waiting_bytes()) == (False, ["full", "drained"], 0)

    on_site(main, replace(OPTIONS, buffer_bytes=1000))


def test_a_too_large_request_closes_the_session_at_its_owner(on_site: RunSite) -> None:
    async def main(site: Site) -> None:
        for transport in ("xhr_send", "jsonp_send"):
            session = site.session()
            assert await site.post(session + "/xhr") == b"o\n"
            await site.fetch("POST", f"{session}/{transport}", b'["' + b"x" * 2000 + b'"]')
            assert await site.post(session + "/xhr") == b'c[3000,"limit exceeded"]\n'
        assert sum(door.oversized for door in site.doors) == 2
        async with site.http.ws_connect(site.url(site.session() + "/websocket")) as socket:
            assert (await socket.receive()).data == "o"
            await socket.send_str('["' + "x" * 2000 + '"]')
            assert (await socket.receive()).data == 'c[3000,"limit exceeded"]'
        assert not any(door.texts for door in site.doors)

    on_site(main, replace(OPTIONS, max_request_bytes=1000))


# ---- the end ------------------------------------------------------------------------------------


def test_every_later_poll_receives_the_close_frame(on_site: RunSite) -> None:
    async def main(site: Site) -> None:
        session = site.session("close")
        assert await site.post(session + "/xhr") == b"o\n"
        for _ in range(2):
            assert await site.post(session + "/xhr") == b'c[3000,"Go away!"]\n'
            assert await site.get(session + "/jsonp?c=x") == (
                b'/**/x("c[3000,\\"Go away!\\"]");\r\n'
            )
            body = await site.post(session + "/xhr_streaming")
            assert body == b"h" * 2048 + b'\nc[3000,"Go away!"]\n'

    on_site(main)


def test_the_close_frame_follows_the_earlier_messages(on_site: RunSite) -> None:
    async def main(site: Site) -> None:
        session = site.session()
        async with site.request("POST", session + "/xhr_streaming", Origin="http://a") as answer:
            await line(answer)
            assert await line(answer) == b"o\n"
            await site.send(session, "last", "close please", "never heard")
            assert await line(answer) == b'a["last"]\n'
            assert await line(answer) == b'c[3001,"as you wish"]\n'
        await site.door.until_closed(1)
        assert site.door.texts == [b"last", b"close please"]
        polled = site.session()
        assert await site.post(polled + "/xhr") == b"o\n"
        await site.send(polled, "last", "close please")
        assert site.door.closed == 1
        assert await site.post(polled + "/xhr") == b'a["last"]\n'
        assert await site.post(polled + "/xhr") == b'c[3001,"as you wish"]\n'
        await site.door.until_closed(2)
        assert await site.post(polled + "/xhr") == b'c[3001,"as you wish"]\n'
        assert site.door.closed == 2

    on_site(main)


def test_an_aborted_session_sends_no_close_frame(on_site: RunSite) -> None:
    async def main(site: Site) -> None:
        path = site.session()
        async with site.request("POST", path + "/xhr_streaming", Origin="http://a") as answer:
            await line(answer)
            await line(answer)
            site.door.sessions[0].abort()
            with contextlib.suppress(ClientError):
                assert await answer.content.read() == b""
        await site.door.until_closed(1)
        assert await site.post(path + "/xhr") == b"o\n"

    on_site(main)


# ---- websocket ----------------------------------------------------------------------------------


def test_websocket(on_site: RunSite) -> None:
    async def main(site: Site) -> None:
        path = site.session() + "/websocket"
        async with (
            site.http.ws_connect(site.url(path)) as one,
            # A WebSocket does not register its ID, so both are separate sessions.
            site.http.ws_connect(site.url(path)) as two,
        ):
            for socket, text in ((one, "a"), (two, "b")):
                assert (await socket.receive()).data == "o"
                for ignored in ("", "[]"):
                    await socket.send_str(ignored)
                await socket.send_str(f'["{text}"]')
                assert (await socket.receive()).data == f'a["{text}"]'
            await one.send_str('["close please"]')
            assert (await one.receive()).data == 'c[3001,"as you wish"]'
            assert (await one.receive()).type is WSMsgType.CLOSE
            assert one.close_code == 1000
        await site.door.until_closed(1)
        assert site.store.asked == 0

    on_site(main)


def test_malformed_json_closes_a_websocket(on_site: RunSite) -> None:
    async def main(site: Site) -> None:
        async with site.http.ws_connect(site.url(site.session() + "/websocket")) as socket:
            assert (await socket.receive()).data == "o"
            await socket.send_str('["a')
            assert (await socket.receive()).type in (WSMsgType.CLOSED, WSMsgType.ERROR)
        await site.door.until_closed(1)

    on_site(main)


def test_a_plain_request_to_the_websocket_path_is_rejected(on_site: RunSite) -> None:
    async def main(site: Site) -> None:
        path = "/echo/0/0/websocket"
        for answer in (
            await site.fetch("GET", path),
            await site.fetch("GET", path, Upgrade="WebSocket", Connection="close"),
        ):
            assert answer == (400, b'Can "Upgrade" only to "WebSocket".\n')

    on_site(main)
