"""Events by HTTP: `POST /api/` in the form of Centrifugo v1, signed with a shared secret."""

from __future__ import annotations

import hashlib
import hmac
import io
import json
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

import aiohttp
import orjson

from producers.outgoing import DestinationUnavailable, Outcome, OutgoingEvent, RejectedEvent
from relay.core.json_text import is_json
from relay.core.model import EntryID

# One request of many commands is refused as a whole when it is too large for the server.
_BODY_BYTES = 256 * 1024
_ANSWER_BYTES = 4 * 1024 * 1024
_HEADERS = {"Content-Type": "application/json", "Prefer": "return=representation"}


class HttpSender:
    """A `Sender` over HTTP. `url` is the relay's (`http://host:8000`) or that of its `/api/`.

    The relay tells the ID to whoever prefers to hear it; Centrifugo itself does not. Text that is
    not JSON travels as a JSON string, for a command has no other place for it.
    """

    def __init__(self, url: str, *, secret: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("the HTTP API's address is http://host:port or https://host:port")
        if not secret:
            raise ValueError("the HTTP API needs the secret that the relay knows")
        self._url = url.rstrip("/") + "/" if parts.path.strip("/") else url.rstrip("/") + "/api/"
        self._secret = secret.encode()
        self._session: aiohttp.ClientSession | None = None

    async def send(
        self, events: Sequence[OutgoingEvent], leaving: Callable[[], None]
    ) -> list[Outcome]:
        """Send in order, in as few requests as their size allows."""
        found: list[Outcome] = []
        commands = [command(each) for each in events]
        while len(found) < len(commands):
            first = len(found)
            last, length = first + 1, len(commands[first])
            while last < len(commands) and length + len(commands[last]) < _BODY_BYTES:
                length += len(commands[last])
                last += 1
            found += await self._post(commands[first:last], leaving)
        return found

    async def close(self) -> None:
        """Give up connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _post(self, commands: Sequence[bytes], leaving: Callable[[], None]) -> list[Outcome]:
        body = commands[0] if len(commands) == 1 else b"[" + b",".join(commands) + b"]"
        sign = hmac.new(self._secret, body, hashlib.sha256).hexdigest()
        headers = {**_HEADERS, "X-API-Sign": sign}
        if self._session is None:
            # The publisher's limit is over all waits together, and the only one.
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=None)
            self._session = aiohttp.ClientSession(timeout=timeout)
        leaving()
        try:
            async with self._session.post(
                self._url, data=io.BytesIO(body), headers=headers, allow_redirects=False
            ) as answer:
                text = await answer.content.read(_ANSWER_BYTES)
                status = answer.status
        except aiohttp.ClientConnectorError as exc:
            raise DestinationUnavailable(f"{self._url} cannot be reached: {exc}") from exc
        except (aiohttp.ClientError, OSError) as exc:
            raise DestinationUnavailable(
                f"{self._url}: {str(exc) or type(exc).__name__}", sent=True
            ) from exc
        if status == 400 and len(commands) > 1:
            # One bad command refuses them all, though those before it were carried out; their
            # uids keep that from happening twice.
            return [outcome for each in commands for outcome in await self._post([each], leaving)]
        if status in (400, 413):
            return [RejectedEvent(f"{self._url} answered {status}: it does not take this event")]
        if status == 401:
            raise DestinationUnavailable(f"{self._url} answered 401: not the secret that it knows")
        if status != 200:
            raise DestinationUnavailable(f"{self._url} answered {status}", sent=status >= 500)
        return self._outcomes(text, len(commands))

    def _outcomes(self, text: bytes, count: int) -> list[Outcome]:
        try:
            replies = json.loads(text)
            return [_outcome(reply) for _, reply in zip(range(count), replies, strict=True)]
        except (ValueError, TypeError, KeyError, AttributeError) as exc:
            raise DestinationUnavailable(
                f"{self._url}: an answer not of this API: {exc}", sent=True
            ) from exc


def _outcome(reply: dict[str, object]) -> Outcome:
    if reply["error"] is not None:
        error = str(reply["error"])
        # Upstream's word for an engine that cannot store just now, with the advice to retry.
        if reply.get("advice") == "retry" or error == "internal server error":
            raise DestinationUnavailable(f"the relay answered: {error}", sent=True)
        return RejectedEvent(error)
    body = reply.get("body")
    return EntryID.parse(str(body["id"])) if isinstance(body, dict) and "id" in body else None


def command(event: OutgoingEvent) -> bytes:
    """A `publish` command; the event's JSON stands in it byte for byte."""
    options = {"uid": event.uid, "type": event.type, "to": event.to, "client": event.client}
    rest = {name: value for name, value in options.items() if value is not None}
    data = event.data
    if not is_json(data):
        data = orjson.dumps(data.decode())
    head = b'{"method":"publish","params":{"channel":' + orjson.dumps(event.channel)
    tail = b"," + orjson.dumps(rest)[1:-1] if rest else b""
    return head + b',"data":' + data + tail + b"}}"
