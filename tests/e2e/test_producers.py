"""The producers in PHP, Node and shell, and the commands of docs/producers.md."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.clients import Native, redis, stream_key
from tests.support.relay import RelayProcess
from tests.support.tools import TOOLS, Tool, run
from tests.support.valkey import Server, password_of

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
