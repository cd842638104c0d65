"""Send events by HTTP: `POST /api/` as in Centrifugo v1, signed with a shared secret."""

from __future__ import annotations

import hashlib
import hmac
import io
import json
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

import aiohttp
import orjson
from typing_extensions import override

from producers.outgoing import (
    DestinationUnavailable,
    Outcome,
    OutgoingEvent,
    RejectedEvent,
    Sender,
)
from relay.core.model import EntryID
from relay.stream.format.json_text import is_json

# The server rejects a request with several commands as a whole if the body is too large.
_BODY_BYTES = 256 * 1024
_RESPONSE_BYTES = 4 * 1024 * 1024
_HEADERS = {"Content-Type": "application/json", "Prefer": "return=representation"}


class HttpSender(Sender):
    """A `Sender` over HTTP. `url` is relay's address (`http://host:8000`) or that of its `/api/`.

    Relay returns entry IDs because of the header `Prefer: return=representation`; Centrifugo does
    not. Data that is not JSON is sent as a JSON string, since a command can only contain JSON.
    """

    def __init__(self, url: str, *, secret: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(
                "address of the HTTP API must be http://host:port or https://host:port"
            )
        if not secret:
            raise ValueError("secret of the HTTP API is empty; see [protocol:centrifugo] secret")
        self._url = url.rstrip("/") + "/" if parts.path.strip("/") else url.rstrip("/") + "/api/"
        self._secret = secret.encode()
        self._session: aiohttp.ClientSession | None = None

    @override
    async def send(
        self, events: Sequence[OutgoingEvent], on_sending: Callable[[], None]
    ) -> list[Outcome]:
        # As few requests as the size limit allows.
        found: list[Outcome] = []
        commands = [command(each) for each in events]
        while len(found) < len(commands):
            first = len(found)
            last, length = first + 1, len(commands[first])
            while last < len(commands) and length + len(commands[last]) < _BODY_BYTES:
                length += len(commands[last])
                last += 1
            found += await self._post(commands[first:last], on_sending)
        return found

    @override
    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _post(
        self, commands: Sequence[bytes], on_sending: Callable[[], None]
    ) -> list[Outcome]:
        body = commands[0] if len(commands) == 1 else b"[" + b",".join(commands) + b"]"
        sign = hmac.new(self._secret, body, hashlib.sha256).hexdigest()
        headers = {**_HEADERS, "X-API-Sign": sign}
        if self._session is None:
            # The only time limit is the publisher's, which covers connecting and sending together.
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=None)
            self._session = aiohttp.ClientSession(timeout=timeout)
        on_sending()
        try:
            async with self._session.post(
                self._url, data=io.BytesIO(body), headers=headers, allow_redirects=False
            ) as response:
                text = await response.content.read(_RESPONSE_BYTES)
                status = response.status
        except aiohttp.ClientConnectorError as exc:
            raise DestinationUnavailable(f"{self._url} cannot be reached: {exc}") from exc
        except (aiohttp.ClientError, OSError) as exc:
            raise DestinationUnavailable(
                f"{self._url}: {str(exc) or type(exc).__name__}", sent=True
            ) from exc
        if status == 400 and len(commands) > 1:
            # One invalid command fails the whole request, although the commands before it were
            # executed. Their uids prevent a second execution.
            return [
                outcome for each in commands for outcome in await self._post([each], on_sending)
            ]
        if status in (400, 413):
            return [RejectedEvent(f"{self._url} rejected the event with status {status}")]
        if status == 401:
            raise DestinationUnavailable(f"{self._url} returned status 401: wrong secret")
        if status != 200:
            raise DestinationUnavailable(
                f"{self._url} returned status {status}", sent=status >= 500
            )
        return self._outcomes(text, len(commands))

    def _outcomes(self, text: bytes, count: int) -> list[Outcome]:
        try:
            replies = json.loads(text)
            return [_outcome(reply) for _, reply in zip(range(count), replies, strict=True)]
        except (ValueError, TypeError, KeyError, AttributeError) as exc:
            raise DestinationUnavailable(
                f"{self._url} returned an unexpected response: {exc}", sent=True
            ) from exc


def _outcome(reply: dict[str, object]) -> Outcome:
    if reply["error"] is not None:
        error = str(reply["error"])
        # Centrifugo returns this error if its engine cannot store messages at the moment.
        if reply.get("advice") == "retry" or error == "internal server error":
            raise DestinationUnavailable(f"the HTTP API returned an error: {error}", sent=True)
        return RejectedEvent(error)
    body = reply.get("body")
    return EntryID.parse(str(body["id"])) if isinstance(body, dict) and "id" in body else None


def command(event: OutgoingEvent) -> bytes:
    """Return a `publish` command that contains the event's JSON unchanged."""
    options = {"uid": event.uid, "type": event.type, "to": event.to, "client": event.client}
    if event.durability is not None:
        options["durability"] = str(event.durability)
    rest = {name: value for name, value in options.items() if value is not None}
    data = event.data
    if not is_json(data):
        data = orjson.dumps(data.decode())
    head = b'{"method":"publish","params":{"channel":' + orjson.dumps(event.channel)
    tail = b"," + orjson.dumps(rest)[1:-1] if rest else b""
    return head + b',"data":' + data + tail + b"}}"
