"""Traces of a relay with the real OpenTelemetry SDK, received by a small OTLP server."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import aiohttp
import pytest

from tests.support.centrifugo_client import SECRET, centrifugo
from tests.support.clients import native, redis
from tests.support.pypi import packages
from tests.support.relay import ROOT, RelayProcess
from tests.support.valkey import Server

pytestmark = [pytest.mark.redis, pytest.mark.timeout(120)]

# Nobody listens there.
_AWAY = "tracing.otlp_url=http://127.0.0.1:9/v1/traces"
_DECODE = """
import base64, json, sys
from google.protobuf.json_format import MessageToDict
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
for line in sys.stdin:
    request = ExportTraceServiceRequest.FromString(base64.b64decode(line))
    for resource in request.resource_spans:
        names = {each.key: each.value.string_value for each in resource.resource.attributes}
        for scope in resource.scope_spans:
            for span in scope.spans:
                print(json.dumps({
                    "service": names["service.name"],
                    "name": span.name,
                    "trace": span.trace_id.hex(),
                    "id": span.span_id.hex(),
                    "parent": span.parent_span_id.hex(),
                    "attributes": {
                        each.key: each.value.string_value or each.value.int_value
                        for each in span.attributes
                    },
                }))
"""


class Collector:
    """Receives OTLP over HTTP, as an OpenTelemetry collector does."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                size = int(self.headers["Content-Length"])
                body = self.rfile.read(size)
                assert self.headers["Content-Type"] == "application/x-protobuf"
                collector.bodies.append(body)
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1/traces"

    def spans(self) -> list[dict[str, Any]]:
        """Return all spans received so far. The peer's packages are not installed here."""
        text = "".join(base64.b64encode(body).decode() + "\n" for body in self.bodies)
        done = subprocess.run(
            [sys.executable, "-c", _DECODE],
            env={**os.environ, "PYTHONPATH": str(packages("opentelemetry"))},
            input=text,
            capture_output=True,
            text=True,
            check=True,
        )
        return [json.loads(line) for line in done.stdout.splitlines()]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def collector() -> Iterator[Collector]:
    running = Collector()
    yield running
    running.close()


def parent(number: int) -> tuple[str, str, str]:
    """Return a trace ID, a span ID and the traceparent of a producer."""
    trace, span = f"{number:032x}", f"{number:016x}"
    return trace, span, f"00-{trace}-{span}-01"


async def test_a_trace_from_each_producer_to_the_delivery(
    valkey: Server, collector: Collector, channel: str
) -> None:
    name = channel.replace("e2e:", "trace.")
    relay = RelayProcess(
        valkey,
        settings=[
            f"tracing.otlp_url={collector.url}",
            f"protocol:centrifugo.secret={SECRET}",
            "protocol:centrifugo.publish=yes",
            "producer:queue.enabled=yes",
            f"producer:queue.name=centrifugo.api.{name}",
        ],
        packages=packages("opentelemetry"),
    )
    await asyncio.to_thread(relay.start)
    try:
        async with native(relay) as door, aiohttp.ClientSession() as http:
            reader = await door.sse(name)
            follower = reader.headers["x-request-id"]
            # Over HTTP, with the producer's trace in the header.
            body = json.dumps({"method": "publish", "params": {"channel": name, "data": 1}})
            sign = hmac.new(SECRET.encode(), body.encode(), hashlib.sha256).hexdigest()
            headers = {"X-API-Sign": sign, "traceparent": parent(0xA1)[2]}
            headers["Content-Type"] = "application/json"
            url = f"{relay.url}/api/"
            async with http.post(url, data=body, headers=headers) as response:
                assert response.status == 200
            headers["traceparent"] = parent(0xD4)[2]
            headers["X-API-Sign"] = "0" * 64
            async with http.post(url, data=body, headers=headers) as refusal:
                assert refusal.status >= 400
            async with centrifugo(relay.url) as clients:
                client = await clients.client()
                await client.subscribe(f"{name}.own")
                assert (await client.ask("publish", channel=f"{name}.own", data=0))["body"][
                    "status"
                ]
                # It is delivered only while the client is there.
                await client.push("message")
            # By the queue, with the producer's trace in the parameters.
            params = {"channel": name, "data": 2, "traceparent": parent(0xB2)[2]}
            command = json.dumps({"method": "publish", "params": params})
            redis(valkey, "RPUSH", f"centrifugo.api.{name}", command)
            # Directly, with the producer's trace in the entry, and with one that is not valid.
            relay.xadd(name, data="3", traceparent=parent(0xC3)[2])
            relay.xadd(name, data="4", traceparent="not a trace")
            blocks = [block.json() for block in await reader.take(4)]
            assert sorted(blocks) == [1, 2, 3, 4]
        # The last spans are exported at the stop.
        assert await asyncio.to_thread(relay.stop) == 0
    finally:
        relay.kill()
    spans = collector.spans()
    assert {span["service"] for span in spans} == {"relay"}
    by_name = {
        (span["name"], span["attributes"].get("messaging.destination.name")): span for span in spans
    }
    by_trace: dict[str, dict[str, Any]] = {}
    for span in spans:
        by_trace.setdefault(span["trace"], {})[span["name"]] = span
    trace, at_producer, _ = parent(0xA1)
    request = by_trace[trace]["POST /api/{rest}"]
    append, delivery = by_trace[trace]["XADD"], by_trace[trace]["deliver"]
    assert [request["parent"], append["parent"], delivery["parent"]] == [
        at_producer,
        request["id"],
        append["id"],
    ]
    entry = append["attributes"]["messaging.message.id"]
    assert delivery["attributes"]["messaging.message.id"] == entry
    assert append["attributes"]["messaging.destination.name"] == name
    # The connections of the request and of the only client.
    assert len(request["attributes"]["relay.connection_id"]) == len(follower)
    assert delivery["attributes"]["relay.connection_id"] == follower
    # A rejected request names the connection as its answer does, and has no traceback.
    rejected = by_trace[parent(0xD4)[0]]["POST /api/{rest}"]
    assert rejected["attributes"]["http.response.status_code"] == refusal.status
    assert rejected["attributes"]["relay.connection_id"] == refusal.headers["X-Request-Id"]
    # An event that a client has published itself.
    published = by_name["XADD", f"{name}.own"]
    assert len(published["attributes"]["relay.connection_id"]) == len(follower)
    trace, at_producer, _ = parent(0xB2)
    append, delivery = by_trace[trace]["XADD"], by_trace[trace]["deliver"]
    assert (append["parent"], delivery["parent"]) == (at_producer, append["id"])
    assert append["attributes"]["relay.source"] == "queue"
    trace, at_producer, _ = parent(0xC3)
    assert by_trace[trace].keys() == {"deliver"}
    assert by_trace[trace]["deliver"]["parent"] == at_producer
    # The client's own event, and all others except that with an invalid traceparent.
    assert sum(span["name"] == "deliver" for span in spans) == 4


async def test_a_collector_that_is_away(valkey: Server, channel: str) -> None:
    relay = RelayProcess(valkey, settings=[_AWAY], packages=packages("opentelemetry"))
    await asyncio.to_thread(relay.start)
    try:
        async with native(relay) as door:
            reader = await door.sse(channel)
            relay.xadd(channel, data="1", traceparent=parent(1)[2])
            assert (await reader.next()).json() == 1
        assert await asyncio.to_thread(relay.stop) == 0
        assert not any("Traceback" in line for line in relay.log)
    finally:
        relay.kill()


def test_missing_packages_are_named() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "relay", "checkconfig", "--set", _AWAY, "--set", "server.port=0"],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "pip install 'relay[otel]'" in done.stderr
    assert done.stderr.count("\n") == 1
