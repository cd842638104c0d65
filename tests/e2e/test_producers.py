"""The producers in PHP, Node and shell, and the commands of docs/producers.md."""

from __future__ import annotations

import asyncio
import json
import os
import re
from asyncio.subprocess import DEVNULL, PIPE
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from producers.publisher import AsyncPublisher, PublishFailed
from tests.support.clients import Native, redis, stream_key
from tests.support.relay import RelayProcess
from tests.support.tools import TOOLS, Tool, run
from tests.support.valkey import Server, password_of, running

pytestmark = pytest.mark.redis
# Another test checks the limit of 200 ms. These tests must pass on a busy machine.
EASY = ("--limit-ms", "9000")
DOCUMENT = Path(__file__).parents[2] / "docs" / "producers.md"
SECRET = "the secret of the api"


@pytest.fixture(scope="module")
def relay(valkey: Server) -> Iterator[RelayProcess]:
    process = RelayProcess(valkey, settings=[f"protocol:centrifugo.secret={SECRET}"]).start()
    yield process
    process.kill()


@pytest.fixture(params=TOOLS)
def tool(request: pytest.FixtureRequest, valkey: Server) -> Tool:
    return Tool.of(request.param, valkey)


def count(server: Server, channel: str) -> int:
    found: int = redis(server, "XLEN", stream_key(channel))
    return found


async def test_an_event_reaches_sse_and_websocket_with_all_that_was_given(
    door: Native, tool: Tool, channel: str
) -> None:
    sse, ws = await door.sse(channel), await door.ws(channel)
    await ws.next()
    data = '{"text":"Grüße \\"$HOME\\"  `x` %s","big":12345678901234567890,"f":1.0}'
    options = ("--type", "chat", "--uid", "u 1", "--to", "alice, bob", "--client", "c1")
    done = await tool.run(channel, data, *options, *EASY)
    assert (done.code, done.err) == (0, ""), done
    block, frame = await sse.next(), await ws.next()
    assert (block.id, block.event, block.data) == (done.out.strip(), "chat", data)
    assert (frame["id"], frame["client"]) == (done.out.strip(), "c1")
    assert frame["data"] == json.loads(data)


async def test_text_and_standard_input_arrive_as_they_are(
    door: Native, tool: Tool, channel: str
) -> None:
    sse = await door.sse(channel)
    first = await tool.run(channel, '<x a="1"/>', *EASY)
    second = await tool.run(channel, "-", *EASY, given='[1,\n "zwölf"]')
    assert first.code == second.code == 0, (first, second)
    assert [block.data for block in await sse.take(2)] == ['<x a="1"/>', '[1,\n "zwölf"]']


async def test_a_uid_is_appended_once_and_gives_the_first_id(
    valkey: Server, tool: Tool, channel: str
) -> None:
    first = await tool.run(channel, "1", "--uid", "order 7", *EASY)
    again = await tool.run(channel, "2", "--uid", "order 7", "--maxlen", "1000", *EASY)
    assert first.out == again.out != ""
    assert count(valkey, channel) == 1
    assert 0 < redis(valkey, "PTTL", f"relay:uid:{{{channel}}}:order 7") <= 86_400_000


@pytest.mark.single_server("the URL of these tools names one server")
async def test_prefix_and_a_login_in_the_url_are_used(
    valkey: Server, tool: Tool, channel: str
) -> None:
    tool.environment = {"RELAY_REDIS_URL": valkey.url("producer"), "RELAY_REDIS_PREFIX": "other:"}
    refused = await tool.run(channel, "1", *EASY)
    assert refused.code == 1
    assert "NOPERM" in refused.err  # the documented rules are for the prefix relay:
    tool.environment = {
        "RELAY_REDIS_URL": valkey.url("admin"),
        "RELAY_REDIS_PREFIX": "other:",
    }
    assert (await tool.run(channel, "1", *EASY)).code == 0
    assert redis(valkey, "XLEN", f"other:stream:{{{channel}}}") == 1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("x" * 256, "1"), "channel must have"),
        (("", "1"), "channel must have"),
        (("news", "1", "--type", "relay:gap"), "type is reserved"),
        (("news", "1", "--type", "a\nb"), "control character"),
        (("news", "1", "--to", " , "), "to has no recipients"),
        (("news", "1", "--uid", "x" * 256), "uid must have"),
    ],
)
async def test_what_the_relay_could_not_deliver_is_refused(
    tool: Tool, arguments: tuple[str, ...], reason: str
) -> None:
    done = await tool.run(*arguments, *EASY)
    assert done.code == 1
    assert reason in done.err
    assert not done.out


@pytest.mark.parametrize(
    "arguments", [(), ("news",), ("a", "b", "c"), ("a", "b", "--limit-ms", "x")]
)
async def test_wrong_usage_is_code_2(tool: Tool, arguments: tuple[str, ...]) -> None:
    done = await tool.run(*arguments)
    assert done.code == 2
    assert "usage" in done.err


async def test_a_wrong_password_and_a_refusal_are_told(
    valkey: Server, tool: Tool, channel: str
) -> None:
    redis(valkey, "SET", stream_key(channel), "not a stream")
    refused = await tool.run(channel, "1", *EASY)
    tool.environment["RELAY_REDIS_PASSWORD"] = "wrong"
    unknown = await tool.run(channel, "1", *EASY)
    assert refused.code == unknown.code == 1
    assert "WRONGTYPE" in refused.err
    assert "WRONGPASS" in unknown.err
    assert "wrong\n" not in unknown.err


async def test_the_shell_publishes_by_http(
    door: Native, valkey: Server, relay: RelayProcess, channel: str
) -> None:
    sse, ws = await door.sse(channel), await door.ws(channel)
    await ws.next()
    tool = Tool("sh", {"PUBLISH_API_SECRET": SECRET})
    http = ("--http", relay.url, *EASY)
    ids = []
    for data in ('{"n":1}', '{"n":2}'):
        options = ("--uid", 'a"\\b', "--client", "c", "--type", "chat", "--to", "alice, bob")
        done = await tool.run(channel, data, *options, *http)
        assert (done.code, done.err) == (0, ""), done
        ids.append(done.out.strip())
    done = await tool.run(channel, "1", "--to", '["Anna Li","bob"]', *http)
    assert done.code == 0, done
    done = await tool.run(channel, "-", *http, given='"last"')
    assert done.code == 0, done
    first, last = await sse.take(2)
    assert (first.id, first.event, first.json()) == (ids[0], "chat", {"n": 1})
    assert ids[0] == ids[1]
    assert (last.id, last.json()) == (done.out.strip(), "last")
    assert (await ws.next())["client"] == "c"

    before = count(valkey, channel)
    for data in ("text", "1,2", '1},"x":{"y":1', "[1}", '"open', "", '1,"channel":"other"'):
        done = await tool.run(channel, data, *http)
        assert done.code == 1, (data, done)
        # The producer detects invalid JSON except for a bare word, which relay rejects.
        assert ("400" if data == "text" else "DATA is not JSON") in done.err
    assert "namespace not found" in (await tool.run("axr:r", "1", *http)).err
    assert "--maxlen cannot be used" in (await tool.run(channel, "1", "--maxlen", "9", *http)).err
    tool.environment["PUBLISH_API_SECRET"] = "wrong"
    assert "401" in (await tool.run(channel, "1", *http)).err
    assert count(valkey, channel) == before


@pytest.fixture(scope="module")
def open_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Run a server whose default user may do everything, and which also listens on ::1."""
    options = ("--bind", "127.0.0.1", "::1")
    server = Server(tmp_path_factory.mktemp("open"), acl=False, options=options)
    with running(server):
        for user, password in {"ann": ">p%25:@é", "free": "nopass"}.items():
            redis(server, "ACL", "SETUSER", user, "on", password, "~*", "+@all")
        yield server


# Addresses and the database that the event must reach; "away" and "wrong" for errors. The server's
# name and port are HERE. The user "ann" has the password "p%25:@é".
ADDRESSES: list[tuple[str, int | str]] = [
    ("redis://HERE/0", 0),
    ("redis://HERE", 0),
    ("REDIS://HERE/", 0),
    ("redis://HERE/3", 3),
    ("redis://[::1]:PORT/2", 2),
    ("redis://[::1]:PORT", 0),
    ("redis://ann:p%2525%3a%40%C3%A9@HERE/1", 1),
    ("redis://ann:p%2525:@é@HERE/1", 1),
    ("redis://free@HERE/4", 4),
    ("redis://HERE/99", "away"),
    ("redis://ann:a%b@HERE/0", "away"),
    ("redis://ann@HERE/0", "away"),
    ("redis://127.0.0.1:1/0", "away"),
    ("redis://HERE/prod", "wrong"),
    ("redis://HERE/0/", "wrong"),
    ("redis://HERE/-1", "wrong"),
    ("redis://HERE/0?x=1", "wrong"),
    ("redis://HERE/0#x", "wrong"),
    ("redis://ann:p/x@HERE/0", "wrong"),
    ("redis://ann:p#x@HERE/0", "wrong"),
    ("redis://ann:p[x@HERE/0", "wrong"),
    ("redis://ann:%ff@HERE/0", "wrong"),
    ("redis://::1:PORT/0", "wrong"),
    ("redis://127.0.0.1:0/0", "wrong"),
    ("redis://127.0.0.1:70000/0", "wrong"),
    ("redis://127.0.0.1:x/0", "wrong"),
    ("redis://:PORT/0", "wrong"),
    ("redis://HERE/0\n", "wrong"),
    ("http://HERE/0", "wrong"),
    ("HERE", "wrong"),
]
# Options and data, and whether an event is published.
VALUES: list[tuple[dict[str, Any], bool]] = [
    ({}, True),
    ({"data": "\ufffd é 𝄞 \x7f", "to": "anna,group:é", "type": "ü", "client": "c"}, True),
    ({"to": '["Anna Li"]'}, True),
    ({"maxlen": 0}, True),
    ({"bytes": "e9"}, False),
    ({"bytes": "eda080"}, False),
    ({"bytes": "c0af"}, False),
    ({"bytes": "f4908080"}, False),
    ({"to": "user:"}, False),
    ({"to": "anna group: bob"}, False),
    ({"to": '["anna"'}, False),
    ({"uid": "é" * 128}, False),
    ({"limit_ms": 0}, False),
]
# Both read a list of cases from standard input and print the results as a list.
IN_PHP = """
require 'producers/php/relay_publish.php';
set_error_handler(function ($number, $text) { throw new ErrorException($text); });
foreach (json_decode(stream_get_contents(STDIN), true) as [$channel, $data, $options]) {
    try { $out[] = relay_publish($channel, base64_decode($data), $options) ? 'id' : 'away'; }
    catch (RelayPublishError $error) { $out[] = 'wrong'; }
}
echo json_encode($out);
"""
IN_NODE = """
import { readFileSync } from "node:fs";
import { publish, PublishError } from "./producers/node/relay-publish.mjs";
process.removeAllListeners("warning");
const out = [];
for (const [channel, data, { limit_ms: limitMs = 9000, ...more }] of JSON.parse(readFileSync(0))) {
  try {
    const id = await publish(channel, Buffer.from(data, "base64"), { ...more, limitMs });
    out.push(id ? "id" : "away");
  } catch (error) {
    out.push(error instanceof PublishError ? "wrong" : String(error));
  }
}
console.log(JSON.stringify(out));
"""
Case = tuple[str, bytes, dict[str, Any]]


async def by_function(words: list[str], cases: list[Case]) -> list[str]:
    given = json.dumps([(name, b64encode(data).decode(), more) for name, data, more in cases])
    done = await run(words, {}, given)
    assert done.code == 0, done
    found: list[str] = json.loads(done.out)
    return found


async def by_python(cases: list[Case]) -> list[str]:
    found = []
    for channel, data, more in cases:
        fields = {name: more.pop(name) for name in ("type", "to", "uid", "client") if name in more}
        try:
            async with AsyncPublisher(more.pop("redis"), **more) as publisher:
                found.append("id" if await publisher.publish(channel, data, **fields) else "away")
        except (PublishFailed, ValueError):
            found.append("wrong")
    return found


async def by_shell(cases: list[Case]) -> list[str]:
    found = []
    for channel, data, more in cases:
        environment = {"RELAY_REDIS_URL": more.pop("redis"), "PATH": os.environ["PATH"]}
        words: list[str | bytes] = [*Tool("sh").command(), channel, data]
        for name, value in more.items():
            words += f"--{name.replace('_', '-')}", str(value)
        process = await asyncio.create_subprocess_exec(
            *words, env=environment, stdout=DEVNULL, stderr=DEVNULL
        )
        found.append({0: "id", 1: "wrong", 2: "wrong", 3: "away"}[await process.wait()])
    return found


async def by(producer: str, cases: list[Case]) -> list[str]:
    if producer == "python":
        return await by_python(cases)
    if producer == "sh":
        return await by_shell(cases)
    if producer == "php":
        return await by_function(["php", "-d", "log_errors=0", "-r", IN_PHP], cases)
    return await by_function(["node", "--input-type=module", "-e", IN_NODE], cases)


@pytest.mark.parametrize("producer", ["python", *TOOLS])
async def test_all_producers_read_addresses_alike(
    open_server: Server, producer: str, channel: str, tmp_path: Path
) -> None:
    port = str(open_server.port)
    cases: list[Case] = []
    for number, (address, _) in enumerate(ADDRESSES):
        url = address.replace("HERE", "127.0.0.1:PORT").replace("PORT", port)
        options = {"redis": url, "limit_ms": 9000, "spool": str(tmp_path / f"spool{number}")}
        cases.append((f"{channel}{number}", b"1", options))
    found: list[int | str] = [*await by(producer, cases)]
    keys = []
    for db in range(16):
        with Redis(port=open_server.port, db=db) as client:
            keys.append((db, client.keys("*")))
    for number, _ in enumerate(ADDRESSES):
        key = f"relay:stream:{{{channel}{number}}}".encode()
        at = [db for db, names in keys if key in names]
        found[number] = at[0] if at and found[number] == "id" else found[number]
        spool = tmp_path / f"spool{number}"
        assert (spool.exists() and spool.stat().st_size > 0) == (found[number] == "away")
        assert not at or at == [found[number]], (ADDRESSES[number], "published, with an error")
    pairs = zip(ADDRESSES, found, strict=True)
    assert not [(case, result) for case, result in pairs if case[1] != result]


@pytest.mark.parametrize("producer", ["python", *TOOLS])
async def test_all_producers_accept_the_same_values(
    open_server: Server, producer: str, channel: str, tmp_path: Path
) -> None:
    url = f"redis://127.0.0.1:{open_server.port}/0"
    cases: list[Case] = []
    for number, (values, _) in enumerate(VALUES):
        options = {"redis": url, "limit_ms": 9000, "spool": str(tmp_path / "spool"), **values}
        data = bytes.fromhex(options.pop("bytes", "")) or options.pop("data", "1").encode()
        cases.append((f"{channel}{number}", data, options))
    found = await by(producer, cases)
    pairs = zip(VALUES, found, strict=True)
    expected = {True: "id", False: "wrong"}
    assert not [(case, result) for case, result in pairs if expected[case[1]] != result]
    spool = tmp_path / "spool"
    assert not spool.exists() or not spool.stat().st_size
    for number, (_, published) in enumerate(VALUES):
        assert count(open_server, f"{channel}{number}") == published
    assert (
        redis(open_server, "XRANGE", stream_key(f"{channel}1"), "-", "+")[0][1][b"data"].decode()
        == VALUES[1][0]["data"]
    )


@pytest.mark.parametrize(
    ("tool", "code"),
    [
        ("node", 'publish("n", 1n)'),
        ("node", 'publish("n", "\\ud800")'),
        ("node", 'publish("n", Symbol())'),
        ("node", "publish(7, 1)"),
        ("node", 'publish("n", 1, { type: Object.create(null) })'),
        ("node", 'publish("n", 1, { to: new Set(["anna"]) })'),
        ("node", 'publish("n", 1, { limitMs: NaN })'),
        ("php", "relay_publish('n', NAN)"),
        ("php", "relay_publish('n', STDIN)"),
        ("php", "relay_publish('n', 1, ['client' => new stdClass()])"),
        ("php", "relay_publish('n', 1, ['to' => [1]])"),
        ("php", "relay_publish('n', 1, ['limit_ms' => 'soon'])"),
    ],
)
async def test_a_value_that_cannot_be_sent_is_the_producers_own_error(tool: str, code: str) -> None:
    if tool == "php":
        words = ["php", "-r", f"require 'producers/php/relay_publish.php'; {code};"]
        assert "RelayPublishError: " in (await run(words, {})).err
    else:
        head = 'import { publish, PublishError } from "./producers/node/relay-publish.mjs";'
        tail = f"await {code}.catch((error) => console.log(error instanceof PublishError));"
        done = await run(["node", "--input-type=module", "-e", head + tail], {})
        assert done.out == "true\n", done


@pytest.mark.parametrize("name", TOOLS)
async def test_an_argument_that_is_not_utf_8_is_rejected(
    open_server: Server, name: str, channel: str
) -> None:
    url = f"redis://127.0.0.1:{open_server.port}/0"
    environment = {"RELAY_REDIS_URL": url, "PATH": os.environ["PATH"]}
    for arguments in ((channel, b"Gr\xfc\xdfe"), (channel, "1", "--client", b"\xff")):
        words: list[str | bytes] = [*Tool(name).command(), *arguments, *EASY]
        process = await asyncio.create_subprocess_exec(*words, env=environment, stderr=PIPE)
        assert b"not UTF-8" in (await process.communicate())[1]
        assert process.returncode == 1
    assert count(open_server, channel) == 0


def documented() -> list[str]:
    return re.findall(r"^\$ (redis-cli .*)$", DOCUMENT.read_text(), re.MULTILINE)


async def test_the_redis_cli_lines_of_the_document_do_what_it_says(
    door: Native, valkey: Server
) -> None:
    sse = await door.sse("news")
    login = {"REDISCLI_AUTH": password_of("producer")}
    lines = documented()
    assert len(lines) == 4
    answers: list[Any] = []
    for line in lines:
        words = line.replace("redis-cli", f"redis-cli -p {valkey.port} --user producer", 1)
        done = await run(["sh", "-c", words], login)
        assert done.code == 0, done
        answers.append(done.out.strip())
    assert answers[2] == answers[3]  # both commands have the same uid
    blocks = await sse.take(3)
    assert [block.id for block in blocks] == answers[:3]
    assert [block.json() for block in blocks] == [{"hello": 1}, {"text": "lunch?"}, {"n": 7}]


def test_one_script_in_all_languages() -> None:
    from relay.stream.write.append import APPEND_ONCE
    from tests.support.tools import PRODUCERS

    for path in ("php/relay_publish.php", "node/relay-publish.mjs", "sh/relay-publish"):
        assert APPEND_ONCE.text in (PRODUCERS / path).read_text()
