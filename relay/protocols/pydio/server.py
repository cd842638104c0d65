"""Asks Pydio who a browser is: in the browser's name, within a time limit, once for all who wait.

What comes of it is an identity, Unauthorized where Pydio knows nobody by the credential, or
Unavailable where it gives no answer.
"""

from __future__ import annotations

import asyncio
import logging
from urllib.parse import urlencode, urlsplit, urlunsplit

import aiohttp
from yarl import URL

from relay import __version__
from relay.core.errors import Unauthorized, Unavailable
from relay.protocols.pydio import identity
from relay.protocols.pydio.credentials import Credentials
from relay.protocols.pydio.identity import Identity, Unclear
from relay.protocols.pydio.settings import PydioSettings

_log = logging.getLogger(__name__)

CONCURRENT = 32
# Waiting for one's turn has a limit too, or a storm of pages on a dead Pydio would hang.
_TURN_TIMEOUTS = 4
_LIMIT_ANSWER_BYTES = 4 << 20


class _AuthRequest:
    """A question under way, and what came of it; neither where whoever asked has gone away."""

    __slots__ = ("done", "error", "found")

    def __init__(self) -> None:
        self.done = asyncio.Event()
        self.found: Identity | None = None
        self.error: Unauthorized | Unavailable | None = None


class PydioServer:
    """One Pydio. `http` belongs to the caller and keeps no cookies: they are other people's."""

    def __init__(self, settings: PydioSettings, http: aiohttp.ClientSession) -> None:
        self._settings = settings
        self._http = http
        self._turns = asyncio.Semaphore(CONCURRENT)
        self._asking: dict[Credentials, _AuthRequest] = {}
        self._failing = False

    def reload(self, settings: PydioSettings) -> None:
        """For questions from now on."""
        self._settings = settings

    async def ask(self, credentials: Credentials) -> Identity:
        """Who that is now. Unauthorized, or Unavailable."""
        while True:
            asking = self._asking.get(credentials)
            if asking is None:
                return await self._lead(credentials)
            await asking.done.wait()
            if asking.error is not None:
                raise asking.error
            if asking.found is not None:
                return asking.found

    async def _lead(self, credentials: Credentials) -> Identity:
        asking = self._asking[credentials] = _AuthRequest()
        try:
            asking.found = await self._turn(credentials)
        except (Unauthorized, Unavailable) as exc:
            asking.error = exc
            raise
        else:
            return asking.found
        finally:
            del self._asking[credentials]
            asking.done.set()

    async def _turn(self, credentials: Credentials) -> Identity:
        limit_s = self._settings.auth_timeout_s
        try:
            async with asyncio.timeout(limit_s * _TURN_TIMEOUTS):
                await self._turns.acquire()
        except TimeoutError:
            raise self._failed("too many questions wait for it") from None
        try:
            async with asyncio.timeout(limit_s):
                found = identity.read(await self._get(credentials))
        except TimeoutError:
            raise self._failed(f"no answer within {limit_s:g} s") from None
        except Unclear as exc:
            raise self._failed(str(exc)) from None
        except (aiohttp.ClientError, OSError, ValueError) as exc:
            # Its text can hold the URL, and that the key.
            raise self._failed(type(exc).__name__) from None
        finally:
            self._turns.release()
        if self._failing:
            self._failing = False
            _log.info("Pydio answers again")
        return found

    async def _get(self, credentials: Credentials) -> bytes:
        headers = {"Accept": "text/xml, application/xml", "User-Agent": f"relay/{__version__}"}
        if credentials.cookies:
            headers["Cookie"] = credentials.cookies
        async with self._http.get(
            self._url(credentials),
            headers=headers,
            # A redirect would carry cookies and key to whoever it names.
            allow_redirects=False,
        ) as response:
            if response.status in (401, 403):
                raise Unauthorized("Pydio knows nobody by this")
            if response.status != 200:
                raise Unclear(f"status {response.status}")
            text = bytearray()
            async for chunk in response.content.iter_chunked(65536):
                text += chunk
                if len(text) > _LIMIT_ANSWER_BYTES:
                    raise Unclear(f"an answer of more than {_LIMIT_ANSWER_BYTES} bytes")
        return bytes(text)

    def _url(self, credentials: Credentials) -> URL:
        fields = {"key": self._settings.key.get_secret_value()}
        if credentials.token:
            # Pydio itself checks them; the hash is over its own path and the user's secret.
            fields |= {"auth_token": credentials.token, "auth_hash": credentials.hash}
        parts = urlsplit(self._settings.auth_url)
        query = "&".join(filter(None, (parts.query, urlencode(fields))))
        return URL(urlunsplit(parts._replace(query=query)), encoded=True)

    # One line when it begins to fail and one when it ends, not one for every browser.
    def _failed(self, reason: str) -> Unavailable:
        if not self._failing:
            self._failing = True
            _log.warning("Pydio does not say who its browsers are: %s", reason)
        return Unavailable("Pydio gives no answer")
