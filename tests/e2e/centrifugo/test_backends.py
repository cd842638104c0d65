"""Centrifugo v1's API libraries cent and jscent, and requests of phpcent and gocent."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import npm, pypi
from tests.support.centrifugo_client import SECRET, Centrifugo, V1Client, centrifugo, sign
from tests.support.programs import program
from tests.support.relay import RelayProcess
from tests.support.valkey import Server

pytestmark = [pytest.mark.redis, pytest.mark.timeout(300)]
RULES = [
    f"protocol:centrifugo.secret={SECRET}",
    "protocol:centrifugo:lib.history_size=10",
    "protocol:centrifugo:lib.history_lifetime=60",
    "protocol:centrifugo:lib.presence=true",
]
CENTS = ["cent-1.3.0", "cent-2.1.0"]

# All methods of the library's client, with the names in its README.
_CENT = """
import json, sys
from cent.core import Client, generate_channel_sign, generate_token
version, url, secret, channel, user = sys.argv[1:]
client = Client(url, secret, timeout=10)

# 1.x returns errors, or pairs of a value and an error; 2.x raises them.
def call(method, *given, **named):
    found = getattr(client, method)(*given, **named)
    value, error = found if isinstance(found, tuple) else (None, found)
    if sys.argv[1].startswith("2"):
        return found
    if error is not None:
        raise error
    return value

said = {}
said["publish"] = call("publish", channel, {"input": "\\u20ac < &"}, client="c1")
said["broadcast"] = call("broadcast", [channel, channel + "-2"], [1, None])
said["history"] = call("history", channel)
said["presence"] = call("presence", channel)
said["channels"] = call("channels")
said["stats"] = call("stats")
client.add("publish", client.get_publish_params(channel, "one"))
client.add("publish", client.get_publish_params("no:such", "two"))
said["batch"] = call("send")
try:
    call("publish", "seafile:1", 1)
except Exception as exc:
    said["error"] = type(exc).__name__ + " " + str(exc)
said["unsubscribe"] = call("unsubscribe", user, channel)
said["disconnect"] = call("disconnect", user)
said["token"] = generate_token(secret, user, "1", "{}")
said["sign"] = generate_channel_sign(secret, "c", "$x", "")
print(json.dumps(said))
"""

_JSCENT = """
const Client = require("jscent");
const [url, secret, channel, user] = process.argv.slice(1);
const client = new Client({url: url, secret: secret});
const said = {};
const call = (name, ...given) => new Promise((done) => {
  client[name](...given, (error, found) => { said[name] = error ? String(error) : found; done(); });
});
(async () => {
  await call("publishClient", channel, {input: "\\u20ac < &"}, "c1");
  await call("publish", channel, [1, null]);
  for (const name of ["history", "presence"]) await call(name, channel);
  for (const name of ["channels", "stats"]) await call(name);
  await call("unsubscribe", user, channel);
  await call("disconnect", user);
  console.log(JSON.stringify(said));
})();
"""

# phpcent 1.0: one command, json_encode, a form with `data` and `sign`.
_PHP = """
$send = function ($method, $params) use ($argv) {
    $data = json_encode(array("method" => $method, "params" => $params));
    $form = array("data" => $data, "sign" => hash_hmac("sha256", $data, $argv[2]));
    $options = array("http" => array(
        "method" => "POST",
        "header" => "Content-Type: application/x-www-form-urlencoded",
        "content" => http_build_query($form),
        "timeout" => 10,
    ));
    return file_get_contents($argv[1] . "/api/", false, stream_context_create($options));
};
echo "[", $send("publish", array("channel" => $argv[3], "data" => array("a" => "/ é + &"))), ",";
echo $send("history", array("channel" => $argv[3])), ",";
echo $send("channels", new stdClass()), "]";
"""


@pytest.fixture(scope="module")
def relay(valkey: Server) -> Iterator[RelayProcess]:
    process = RelayProcess(valkey, settings=RULES).start()
    yield process
    process.kill()


@pytest.fixture
async def site(relay: RelayProcess) -> AsyncIterator[Centrifugo]:
    async with centrifugo(relay.url) as one:
        yield one


async def subscribed(site: Centrifugo, user: str, channel: str) -> V1Client:
    client = await site.client(user)
    await client.subscribe(channel)
    return client


async def finished(process: subprocess.CompletedProcess[str]) -> Any:
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.mark.parametrize("library", CENTS)
async def test_all_methods_of_cent(site: Centrifugo, relay: RelayProcess, library: str) -> None:
    channel, user = f"lib:{library}", library
    client = await subscribed(site, user, channel)
    version = library.partition("-")[2]
    arguments = ["-c", _CENT, version, relay.url, SECRET, channel, user]
    said = await finished(await asyncio.to_thread(pypi.run, library, arguments))
    # The library returns this for "body": null.
    for method in ("publish", "broadcast", "unsubscribe", "disconnect"):
        assert said[method] in (None, True), said
    assert [each["data"] for each in said["history"]] == [[1, None], {"input": "€ < &"}]
    assert said["history"][1]["client"] == "c1"
    assert said["presence"] == {client.id: {"user": user, "client": client.id}}
    assert channel in said["channels"]
    assert said["stats"]["nodes"][0]["metrics"]["node_num_clients"] >= 1
    assert [each["error"] for each in said["batch"]] == [None, "namespace not found"]
    assert said["error"] == "ResponseError namespace not found"
    assert said["token"] == sign(user, "1", "{}")
    assert said["sign"] == sign("c", "$x", "")
    found = [(await client.push("message"))["data"] for _ in range(3)]
    assert found == [{"input": "€ < &"}, [1, None], "one"]
    assert (await client.push("unsubscribe"))["channel"] == channel
    assert (await client.until_closed())[0] == 3000


@pytest.mark.parametrize("library", CENTS)
async def test_the_console_script_of_cent(
    site: Centrifugo, relay: RelayProcess, library: str, tmp_path: Path
) -> None:
    channel = f"lib:console-{library}"
    client = await subscribed(site, "anna", channel)
    config = tmp_path / "centrc"
    config.write_text(f"[relay]\naddress = {relay.url}\nsecret = {SECRET}\ntimeout = 10\n")
    folder = await asyncio.to_thread(pypi.packages, library)
    script = str(folder / "bin" / "cent")
    params = json.dumps({"channel": channel, "data": {"from": "console"}})
    command = [script, "relay", "publish", "--config", str(config)]
    done = await asyncio.to_thread(pypi.run, library, command, params)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (await client.push("message"))["data"] == {"from": "console"}
    config.write_text(f"[relay]\naddress = {relay.url}\nsecret = wrong\ntimeout = 10\n")
    done = await asyncio.to_thread(pypi.run, library, command, params)
    assert done.returncode != 0
    assert "401" in done.stdout + done.stderr


async def test_all_methods_of_jscent(site: Centrifugo, relay: RelayProcess) -> None:
    channel = "lib:jscent"
    environment = await asyncio.to_thread(npm.environment)
    client = await subscribed(site, "jane", channel)
    process = await asyncio.create_subprocess_exec(
        npm.node(), "-e", _JSCENT, "--", relay.url, SECRET, channel, "jane",
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    out, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    said = json.loads(out)
    assert [each["data"] for each in said["history"]["body"]["data"]] == [
        [1, None],
        {"input": "€ < &"},
    ]
    assert list(said["presence"]["body"]["data"]) == [client.id]
    assert channel in said["channels"]["body"]["data"]
    assert said["stats"]["body"]["data"]["nodes"]
    for method in ("publish", "publishClient", "unsubscribe", "disconnect"):
        assert said[method]["error"] is None
    assert (await client.push("unsubscribe"))["channel"] == channel
    assert (await client.until_closed())[0] == 3000


async def test_requests_as_phpcent_sends_them(relay: RelayProcess) -> None:
    php = program("php", "php-cli")
    done = await asyncio.to_thread(
        subprocess.run,
        [php, "-r", _PHP, "--", relay.url, SECRET, "lib:php"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    (published,), (history,), (channels,) = await finished(done)
    assert published == {"method": "publish", "error": None, "body": None}
    assert [each["data"] for each in history["body"]["data"]] == [{"a": "/ é + &"}]
    assert channels["error"] is None


def test_requests_as_gocent_sends_them(relay: RelayProcess) -> None:
    body = (
        b'[{"uid":"4CvUnh2rC3hHW5bhvhFlXc","method":"publish","params":{"channel":"lib:go",'
        b'"data":{"value":1},"client":""}},'
        b'{"uid":"4CvUnh2rC3hHW5bhvhFlYj","method":"history","params":{"channel":"lib:go"}},'
        b'{"uid":"4CvUnh2rC3hHW5bhvhFlZq","method":"stats","params":{}}]'
    )
    head = (
        f"POST /api/ HTTP/1.1\r\nHost: 127.0.0.1:{relay.port}\r\n"
        f"User-Agent: Go-http-client/1.1\r\nContent-Length: {len(body)}\r\n"
        f"Content-Type: application/json\r\nX-Api-Sign: {sign(body)}\r\n"
        "Accept-Encoding: gzip\r\nConnection: close\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", relay.port), timeout=30) as connection:
        connection.sendall(head.encode() + body)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    headers, _, text = answer.partition(b"\r\n\r\n")
    assert headers.startswith(b"HTTP/1.1 200 ")
    published, history, stats = json.loads(text)
    assert (published["uid"], published["error"]) == ("4CvUnh2rC3hHW5bhvhFlXc", None)
    assert [each["data"] for each in history["body"]["data"]] == [{"value": 1}]
    # Its structs have integers only, and ignore names that they do not contain.
    metrics = stats["body"]["data"]["nodes"][0]["metrics"]
    assert {type(each) for each in metrics.values()} == {int}
