"""Requests to Pydio: which user does a browser's credential belong to?"""

from __future__ import annotations

import asyncio
import logging
from urllib.parse import urlencode, urlsplit, urlunsplit

import aiohttp
from yarl import URL

from relay import __version__
from relay.core.coalescing import RequestCoalescer
from relay.core.errors import Unauthorized, Unavailable
from relay.protocols.pydio import identity
from relay.protocols.pydio.credentials import Credentials
from relay.protocols.pydio.identity import Identity, InvalidResponse
from relay.protocols.pydio.settings import PydioSettings

_log = logging.getLogger(__name__)

CONCURRENT = 32
# Limit the wait for one of these requests too: otherwise many browsers would wait very long for a
# Pydio that does not answer.
_QUEUE_TIMEOUTS = 4
_LIMIT_RESPONSE_BYTES = 4 << 20


class PydioServer:
    """Client for one Pydio server.

    The HTTP session is owned by the caller and must not store cookies, because each request carries
    a different user's cookies. Concurrent requests with the same credentials are sent once.
    """

    def __init__(self, settings: PydioSettings, http: aiohttp.ClientSession) -> None:
        self._settings = settings
        self._http = http
        self._slots = asyncio.Semaphore(CONCURRENT)
        self._requests: RequestCoalescer[Credentials, Identity] = RequestCoalescer()
        self._failing = False

    def reload(self, settings: PydioSettings) -> None:
        """Use new settings for new requests."""
        self._settings = settings

    async def authenticate(self, credentials: Credentials) -> Identity:
        """Return the user of these credentials.

        Raises:
            Unauthorized: Pydio does not accept the credentials.
            Unavailable: Pydio did not give a valid answer in time.
        """
        return await self._requests.run(credentials, self._request)

    async def _request(self, credentials: Credentials) -> Identity:
        limit_s = self._settings.auth_timeout_s
        try:
            async with asyncio.timeout(limit_s * _QUEUE_TIMEOUTS):
                await self._slots.acquire()
        except TimeoutError:
            raise self._failed(f"{CONCURRENT} earlier requests are still waiting") from None
        try:
            async with asyncio.timeout(limit_s):
                found = identity.read(await self._get(credentials))
        except TimeoutError:
            raise self._failed(f"no response within {limit_s:g} s") from None
        except InvalidResponse as exc:
            raise self._failed(str(exc)) from None
        except (aiohttp.ClientError, OSError, ValueError) as exc:
            # Don't log the text: it can contain the URL with the key.
            raise self._failed(type(exc).__name__) from None
        finally:
            self._slots.release()
        if self._failing:
            self._failing = False
            _log.info("Pydio authentication requests succeed again")
        return found

    async def _get(self, credentials: Credentials) -> bytes:
        headers = {"Accept": "text/xml, application/xml", "User-Agent": f"relay/{__version__}"}
        if credentials.cookies:
            headers["Cookie"] = credentials.cookies
        async with self._http.get(
            self._url(credentials),
            headers=headers,
            # A redirect would send the cookies and the key to another server.
            allow_redirects=False,
        ) as response:
            if response.status in (401, 403):
                raise Unauthorized("Pydio does not accept these credentials")
            if response.status != 200:
                raise InvalidResponse(f"status {response.status}")
            text = bytearray()
            async for chunk in response.content.iter_chunked(65536):
                text += chunk
                if len(text) > _LIMIT_RESPONSE_BYTES:
                    raise InvalidResponse(f"response exceeds {_LIMIT_RESPONSE_BYTES} bytes")
        return bytes(text)

    def _url(self, credentials: Credentials) -> URL:
        fields = {"key": self._settings.key.get_secret_value()}
        if credentials.token:
            # Pydio verifies them. The hash is computed from Pydio's own path and the user's secret.
            fields |= {"auth_token": credentials.token, "auth_hash": credentials.hash}
        parts = urlsplit(self._settings.auth_url)
        query = "&".join(filter(None, (parts.query, urlencode(fields))))
        return URL(urlunsplit(parts._replace(query=query)), encoded=True)

    # Log the first failure and the first success after it, not each request.
    def _failed(self, reason: str) -> Unavailable:
        if not self._failing:
            self._failing = True
            _log.warning(
                "Pydio authentication request failed: %s; browsers cannot connect, and rights"
                " are not updated ([protocol:pydio] auth_url)",
                reason,
            )
        return Unavailable("Pydio is unavailable")
