"""Requests to Pydio: which user does a browser's credential belong to?"""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import urlencode, urlsplit, urlunsplit

import aiohttp
from yarl import URL

from relay import __version__
from relay.core.coalescing import RequestCoalescer
from relay.core.errors import Unauthorized, Unavailable
from relay.protocols.pydio import identity
from relay.protocols.pydio.credentials import Credentials
from relay.protocols.pydio.identity import Identity
from relay.protocols.pydio.settings import PydioSettings
from relay.rights.application import ApplicationRequests, InvalidResponse, read_response

CONCURRENT = 32
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
        self._application = ApplicationRequests(
            "Pydio authentication request",
            concurrent=CONCURRENT,
            queue_timeouts=_QUEUE_TIMEOUTS,
            consequence="browsers cannot connect, and rights are not updated"
            " ([protocol:pydio] auth_url)",
        )
        self._requests: RequestCoalescer[Credentials, Identity] = RequestCoalescer()
        # Returns the user of credentials that Pydio has accepted before, else ''. For the log.
        self.user_of: Callable[[Credentials], str] = lambda _: ""

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
        try:
            about = self.user_of(credentials) or "a browser whose user is unknown"
            async with self._application.request(self._settings.auth_timeout_s, about):
                return identity.read(await self._get(credentials))
        except InvalidResponse:
            raise Unavailable("Pydio is unavailable") from None

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
            return await read_response(response, _LIMIT_RESPONSE_BYTES)

    def _url(self, credentials: Credentials) -> URL:
        fields = {"key": self._settings.key.get_secret_value()}
        if credentials.token:
            # Pydio verifies them. The hash is computed from Pydio's own path and the user's secret.
            fields |= {"auth_token": credentials.token, "auth_hash": credentials.hash}
        parts = urlsplit(self._settings.auth_url)
        query = "&".join(filter(None, (parts.query, urlencode(fields))))
        return URL(urlunsplit(parts._replace(query=query)), encoded=True)
