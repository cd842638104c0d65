"""Centrifugo v1's HTTP API on a real relay, compared byte for byte."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any
from urllib.parse import urlencode

import aiohttp
import pytest
from yarl import URL

from tests.support.clients import redis, until
from tests.support.relay import RelayProcess
from tests.support.valkey import Server

pytestmark = pytest.mark.redis
SECRET = "a secret of the API"
OK = b'{"method":"publish","error":null,"body":null}'


@pytest.fixture(scope="module")
def relay(valkey: Server) -> Iterator[RelayProcess]:
    settings = [f"protocol:centrifugo.secret={SECRET}", "protocol:centrifugo.api_max_bytes=100000"]
    process = RelayProcess(valkey, settings=settings).start()
    yield process
    process.kill()


def sign(body: bytes, secret: str = SECRET) -> str:
    return hmac.digest(secret.encode(), body, "sha256").hex()


class Api:
    """A client of the HTTP API that can also send invalid requests."""

    def __init__(self, session: aiohttp.ClientSession, relay: RelayProcess) -> None:
        self.session = session
        self.relay = relay

    async def raw(
        self, body: bytes, *, method: str = "POST", path: str = "/api/", **headers: str
    ) -> tuple[int, bytes, str]:
        url = URL(self.relay.url + path, encoded=True)
        async with self.session.request(
            method, url, data=body, headers=headers, allow_redirects=False
        ) as answer:
            return answer.status, await answer.read(), answer.headers.get("Content-Type", "")

    async def json(self, body: bytes, **more: str) -> tuple[int, bytes, str]:
        headers = {"Content-Type": "application/json", "X-API-Sign": sign(body)}
        return await self.raw(body, **(headers | more))

    async def ask(self, text: str) -> Any:
        status, body, kind = await self.json(text.encode())
        assert (status, kind) == (200, "application/json"), body
        return json.loads(body)

    def entries(self, channel: str) -> list[dict[bytes, bytes]]:
        client: Any = self.relay.redis()
        with client:
            return [fields for _, fields in client.xrange(f"relay:stream:{{{channel}}}")]


@pytest.fixture
async def api(relay: RelayProcess) -> AsyncIterator[Api]:
    async with aiohttp.ClientSession() as session:
        yield Api(session, relay)


def publish(channel: str, data: str = "1", rest: str = "") -> str:
    return f'{{"method":"publish","params":{{"channel":"{channel}","data":{data}}}{rest}}}'


async def test_a_publish_is_answered_once_the_entry_is_there(api: Api, channel: str) -> None:
    data = '{ "a" : [], "n": 12345678901234567890, "f": 1.0 }'
    text = publish(channel, data).encode()
    assert await api.json(text) == (200, b"[" + OK + b"]", "application/json")
    assert api.entries(channel) == [{b"data": data.encode()}]


async def test_an_array_is_carried_out_in_order(api: Api, channel: str) -> None:
    text = ",".join(publish(channel, str(n), f',"uid":"{n}"') for n in range(100))
    answer = await api.json(f"[{text}]".encode())
    wanted = ",".join(
        f'{{"uid":"{n}","method":"publish","error":null,"body":null}}' for n in range(100)
    )
    assert answer == (200, f"[{wanted}]".encode(), "application/json")
    assert [fields[b"data"] for fields in api.entries(channel)] == [b"%d" % n for n in range(100)]
    assert await api.ask("[]") == []


async def test_client_and_uid_travel_and_a_uid_counts_once(api: Api, channel: str) -> None:
    params = f'{{"Channel":"{channel}","data":1,"client":"c","uid":"u"}}'
    for _ in range(2):
        assert await api.ask(f'{{"method":"publish","params":{params}}}')
    assert api.entries(channel) == [{b"data": b"1", b"client": b"c", b"uid": b"u"}]


async def test_type_and_to_travel_as_in_an_entry(api: Api, channel: str) -> None:
    text = '{"method":"publish","params":{"channel":"%s","data":1,"type":"chat","to":%s}}'
    for to in ('"bob, group:kitchen"', '["Anna Li"]'):
        assert (await api.ask(text % (channel, to)))[0]["error"] is None
    broadcast = '{"method":"broadcast","params":{"channels":["%s"],"data":1,"to":"bob"}}'
    assert (await api.ask(broadcast % channel))[0]["error"] is None
    assert api.entries(channel) == [
        {b"data": b"1", b"type": b"chat", b"to": b"group:kitchen,user:bob"},
        {b"data": b"1", b"type": b"chat", b"to": b'["user:Anna Li"]'},
        {b"data": b"1", b"to": b"user:bob"},
    ]
    for wrong in ("[]", '" , "', '"[1]"'):
        (reply,) = await api.ask(text % (channel, wrong))
        assert (reply["error"], reply["advice"]) == ("invalid message", "fix")
    (reply,) = await api.ask(text.replace("chat", "relay:gap") % (channel, '"bob"'))
    assert (reply["error"], reply["advice"]) == ("invalid message", "fix")
    (reply,) = await api.ask(broadcast.replace('"bob"', "[]") % channel)
    assert (reply["error"], reply["advice"]) == ("invalid message", "fix")
    assert (await api.json((text % (channel, "1")).encode()))[0] == 400
    assert len(api.entries(channel)) == 3


async def test_whoever_prefers_it_is_told_the_entry_s_id(api: Api, channel: str) -> None:
    again = publish(channel, "1").replace('"data"', '"uid":"u","data"')
    broadcast = f'{{"method":"broadcast","params":{{"channels":["{channel}"],"data":1}}}}'
    body = f"[{again},{again},{publish('seafile:r')},{broadcast}]".encode()
    _, text, _ = await api.json(body, Prefer="respond-async, return=representation")
    first, second, refused, several = json.loads(text)
    client: Any = api.relay.redis()
    with client:
        ids = [each.decode() for each, _ in client.xrange(f"relay:stream:{{{channel}}}")]
    assert first == second == {"method": "publish", "error": None, "body": {"id": ids[0]}}
    assert refused["body"] is several["body"] is None
    _, text, _ = await api.json(body)
    assert [reply["body"] for reply in json.loads(text)] == [None] * 4


async def test_the_answer_names_the_durability_that_was_reached_or_missed(
    api: Api, channel: str
) -> None:
    text = '{"method":"publish","params":{"channel":"%s","data":1,"durability":"%s"}}'
    (reply,) = await api.ask(text % (channel, "fast"))
    assert (reply["error"], reply["body"]) == (None, {"durability": "fast"})
    (reply,) = await api.ask(text % (channel, "replicated:1:50"))
    client: Any = api.relay.redis()
    with client:
        ids = [each.decode() for each, _ in client.xrange(f"relay:stream:{{{channel}}}")]
    assert reply["error"] == (
        f"internal server error: appended as {ids[1]}, but 0 of 1 replicas have confirmed it within"
        " 50 ms"
    )
    assert (reply["advice"], reply["body"]) == ("retry", {"id": ids[1]})
    (reply,) = await api.ask(text % (channel, "disk"))
    assert (reply["error"], reply["advice"]) == ("invalid message", "fix")
    # The user of docs/redis.md may not run WAITAOF, and Redis 7.0 does not have it.
    (reply,) = await api.ask(text % (channel, "fsynced"))
    assert "durability fsynced is not available: " in reply["error"]
    cause = "Redis refuses WAITAOF (NOPERM" if api.relay.server.has("waitaof") else "has no WAITAOF"
    assert cause in reply["error"]
    assert (reply["advice"], reply["body"]) == ("fix", None)
    assert len(api.entries(channel)) == 2


async def test_uids_need_not_be_unique_where_the_namespace_says_so(
    valkey: Server, channel: str
) -> None:
    settings = [
        f"protocol:centrifugo.secret={SECRET}",
        "protocol:pydio.key=adminsecretkey",
        "producer:queue.enabled=yes",
        "namespace.unique_uids=no",
    ]
    relay = RelayProcess(valkey, settings=settings)
    await asyncio.to_thread(relay.start)
    try:
        async with aiohttp.ClientSession() as session:
            api = Api(session, relay)
            again = publish(channel, "1").replace('"data"', '"uid":"u","data"')
            for _ in range(2):
                assert [each["error"] for each in await api.ask(f"[{again},{again}]")] == [None] * 2
            wanted = [{b"data": b"1", b"uid": b"u"}] * 4
            assert api.entries(channel) == wanted
            redis(valkey, "RPUSH", "centrifugo.api", again, again)
            await until(lambda: len(api.entries(channel)) == 6)
            assert redis(valkey, "EXISTS", f"relay:uid:{{{channel}}}:u") == 0
            # Relay still writes deduplication keys for its own appends, which it retries after a
            # lost connection.
            headers = {"Admin-Key": "adminsecretkey"}
            async with session.ws_connect(f"{relay.url}/private", headers=headers) as socket:
                await socket.send_str('{"REPO_ID":"uids","CONTENT":"<tree/>"}')
                await until(lambda: redis(valkey, "KEYS", "relay:uid:{pydio:uids}:*"))
    finally:
        await asyncio.to_thread(relay.kill)


async def test_a_broadcast_stops_at_its_first_error(api: Api, channel: str) -> None:
    text = '{"method":"broadcast","params":{"channels":%s,"data":%s,"client":"c"}}'
    both = json.dumps([channel, f"{channel}2"])
    assert await api.ask(text % (both, '"x"')) == [
        {"method": "broadcast", "error": None, "body": None}
    ]
    assert api.entries(f"{channel}2") == [{b"data": b'"x"', b"client": b"c"}]
    (reply,) = await api.ask(text % (json.dumps([f"{channel}3", "axr:r", f"{channel}4"]), "1"))
    assert (reply["error"], reply["advice"]) == ("namespace not found", "fix")
    assert len(api.entries(f"{channel}3")) == 1
    assert api.entries(f"{channel}4") == []
    for wrong in ("[]", "null", '[""]'):
        (reply,) = await api.ask(text % (wrong, "1"))
        assert (reply["error"], reply["advice"]) == ("invalid message", "fix")
    # The channels before the empty name receive the event, as in Centrifugo.
    (reply,) = await api.ask(text % (json.dumps([f"{channel}5", "", f"{channel}6"]), "1"))
    assert (reply["error"], reply["advice"]) == ("invalid message", "fix")
    assert len(api.entries(f"{channel}5")) == 1
    assert api.entries(f"{channel}6") == []


async def test_errors_of_one_command_leave_the_others(api: Api, channel: str) -> None:
    commands = [publish("seafile:r"), publish("x" * 256), publish(channel), publish("$pydio:x")]
    body = ",".join(commands)
    _, answer, _ = await api.json(f"[{body}]".encode())
    refused = b'{"method":"publish","error":"%s","advice":"fix","body":null}'
    namespace = refused % b"namespace not found"
    wanted = [namespace, refused % b"invalid message", OK, namespace]
    assert answer == b"[" + b",".join(wanted) + b"]"
    (reply,) = await api.ask(publish("seafile:r"))
    assert reply["error"] == "namespace not found"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        " {}",
        "1",
        "{}",
        '{"method":"sing","params":{}}',
        '{"method":"publish"}',
        '{"method":"publish","params":[]}',
        '{"method":"publish","params":{"channel":"a"}}',
        '{"method":"publish","params":{"data":1}}',
        '{"method":"publish","params":{"channel":1,"data":1}}',
        '{"method":1}',
        "[1]",
        '{"method":"publish","params":{"channel":"a","data":1}}x',
    ],
)
async def test_what_cannot_be_understood_is_a_bad_request(api: Api, text: str) -> None:
    answer = await api.json(text.encode())
    assert answer == (400, b"Bad Request\n", "text/plain; charset=utf-8")


async def test_commands_before_a_broken_one_have_been_carried_out(api: Api, channel: str) -> None:
    status, _, _ = await api.json(f'[{publish(channel)},{{"method":"sing"}}]'.encode())
    assert status == 400
    assert len(api.entries(channel)) == 1


async def test_only_a_signed_request_is_heard(api: Api, channel: str) -> None:
    body = publish(channel).encode()
    plain = {"Content-Type": "application/json"}
    assert (await api.raw(body, **plain))[0] == 400
    for wrong in (sign(body).upper(), sign(body, ""), sign(body + b" "), "é", "x"):
        status, text, kind = await api.raw(body, **plain, **{"X-API-Sign": wrong})
        assert (status, text, kind) == (401, b"Unauthorized\n", "text/plain; charset=utf-8")
    assert api.entries(channel) == []


@pytest.mark.parametrize("method", ["GET", "PUT", "POST", "DELETE"])
async def test_any_method_and_any_path_below(api: Api, channel: str, method: str) -> None:
    body = publish(channel).encode()
    assert (await api.json(body, method=method, path="/api/v1/x"))[0] == 200
    assert (await api.raw(b"", method=method, path="/api?a=b"))[0] == 301


async def test_the_forms_of_the_older_libraries(api: Api, channel: str) -> None:
    data = publish(channel, '"é+&"')
    fields = {"data": data, "sign": sign(data.encode())}
    form = "application/x-www-form-urlencoded"
    query = urlencode(fields)
    assert (await api.raw(query.encode(), **{"Content-Type": form}))[0] == 200
    assert (await api.raw(b"", method="GET", path=f"/api/?{query}"))[0] == 200
    parts = aiohttp.FormData(fields, default_to_multipart=True)
    async with api.session.post(f"{api.relay.url}/api/", data=parts) as answer:
        assert answer.status == 200
    assert api.entries(channel) == [{b"data": '"é+&"'.encode()}] * 3


async def test_too_large_a_request_is_refused(api: Api, channel: str) -> None:
    assert (await api.json(publish(channel, f'"{"x" * 100_000}"').encode()))[0] == 413
    assert api.entries(channel) == []


async def test_what_cannot_be_valid_is_answered_before_its_body_arrives(api: Api) -> None:
    signed = b"X-API-Sign: " + b"a" * 64
    for header, status in (
        (b"X: x", b"400"),
        (b"X-API-Sign: no signature", b"401"),
        (signed + b"\r\nContent-Encoding: gzip", b"415"),
        (signed + b"\r\nContent-Encoding: deflate", b"415"),
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", api.relay.port)
        writer.write(
            b"POST /api/ HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 1000\r\n" + header + b"\r\n\r\n{"
        )
        async with asyncio.timeout(30):
            head = await reader.readuntil(b"\r\n\r\n")
        assert head.split()[1] == status
        assert b"Connection: close" in head
        writer.transport.abort()


async def test_requests_at_one_time_are_all_answered(api: Api, channel: str) -> None:
    async with asyncio.TaskGroup() as tasks:
        asked = [tasks.create_task(api.ask(publish(channel, str(n)))) for n in range(100)]
    assert all(task.result()[0]["error"] is None for task in asked)
    assert sorted(int(fields[b"data"]) for fields in api.entries(channel)) == list(range(100))


async def test_without_a_secret_there_is_no_api(valkey: Server) -> None:
    process = RelayProcess(valkey)
    await asyncio.to_thread(process.start)
    try:
        body = publish("c").encode()
        async with aiohttp.ClientSession() as session:
            headers = {"Content-Type": "application/json", "X-API-Sign": sign(body, "")}
            async with session.post(f"{process.url}/api/", data=body, headers=headers) as answer:
                assert answer.status == 404
        assert any("Protocol centrifugo is disabled" in line for line in process.log)
    finally:
        await asyncio.to_thread(process.kill)


async def test_redis_away_is_an_error_and_never_a_success(tmp_path: Any) -> None:
    server = Server(tmp_path)
    server.start()
    settings = [f"protocol:centrifugo.secret={SECRET}", "publish.timeout_s=0.5"]
    # Only the time limit of a publication can end the wait.
    settings.append("redis.command_timeout_s=300")
    process = RelayProcess(server, settings=settings)
    try:
        await asyncio.to_thread(process.start)
        async with aiohttp.ClientSession() as session:
            api = Api(session, process)
            assert (await api.ask(publish("c")))[0]["error"] is None
            server.freeze()
            body = publish("c").encode()
            async with asyncio.timeout(30):
                answer = await api.json(body)
            assert answer[0] == 200
            error = b'"error":"internal server error","advice":"retry"'
            assert answer[1] == b'[{"method":"publish",' + error + b',"body":null}]'
            server.thaw()
            assert (await api.ask(publish("c")))[0]["error"] is None
    finally:
        await asyncio.to_thread(process.kill)
        server.kill()
