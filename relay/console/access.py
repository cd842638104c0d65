"""Login, sessions and protection against requests of other sites.

Sessions are in Redis, so that they are valid on all workers and end with a logout. A session's
value depends on the password: a changed password ends all sessions.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import math
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

import orjson
from aiohttp import web

from relay.core.errors import Forbidden, LimitExceeded, Unauthorized
from relay.doorkit.origins import AllowedOrigins
from relay.transports.socket.take_over import connection_of, is_secure

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from relay.doorkit.contract import Store
    from relay.stream.cluster.login_attempts import LoginAttempts

_log = logging.getLogger(__name__)

COOKIE = "relay_console"
CSRF_HEADER = "X-CSRF-Token"
SESSION_S = 12 * 3600
_ID_BYTES = 32


class TooManyAttempts(LimitExceeded):
    """Too many attempts to log in. `wait_s` is the time after which the next one is allowed."""

    def __init__(self, wait_s: float) -> None:
        self.wait_s = max(1, math.ceil(wait_s))
        super().__init__(f"too many attempts to log in; try again in {self.wait_s} s")


@dataclass(frozen=True, slots=True)
class ConsoleSession:
    """The session of an operator. Requests that change something must send `csrf`."""

    id: str
    csrf: str


class Access:
    """Checks passwords, sessions and origins for the console at one address."""

    def __init__(
        self,
        *,
        store: Store,
        attempts: LoginAttempts,
        passwords: Callable[[], Sequence[str]],
    ) -> None:
        """`passwords` are the valid ones."""
        self._store = store
        self._attempts = attempts
        self._passwords = passwords
        self._origins = AllowedOrigins(frozenset(), "")

    def check_origin(self, request: web.Request) -> None:
        """Raise Forbidden if a page of another site makes this request.

        Browsers send Sec-Fetch-Site to secure hosts and Origin with every POST. Programs send
        neither.
        """
        site = request.headers.get("Sec-Fetch-Site")
        if site is not None:
            if site not in ("same-origin", "none"):
                raise Forbidden("the console accepts requests from its own page only")
        elif "Origin" in request.headers and not self._origins.allow(request.headers):
            raise Forbidden(
                "the console accepts requests from its own page only; a proxy must pass on Host"
            )

    async def login(self, request: web.Request, password: str) -> ConsoleSession:
        """Return a new session. Unauthorized for a wrong password, LimitExceeded for too many."""
        address = connection_of(request).address
        if wait_s := await self._attempts.begin(address):
            raise TooManyAttempts(wait_s)
        # Compare with each of them, so that the time does not depend on which one it is.
        if not sum(_equal(password, each) for each in self._passwords()):
            _log.warning("Console: wrong password from %s", address or "an unknown address")
            raise Unauthorized("wrong password")
        await self._attempts.succeeded(address)
        session = ConsoleSession(*(secrets.token_urlsafe(_ID_BYTES) for _ in range(2)))
        value = orjson.dumps({"csrf": session.csrf, "proof": self._proof(session.id)})
        await self._store.put(_name(session.id), value, SESSION_S)
        _log.info("Console: login from %s", address or "an unknown address")
        return session

    async def session(self, request: web.Request) -> ConsoleSession:
        """Return the session of the request's cookie. Unauthorized if there is none."""
        session_id = request.cookies.get(COOKIE, "")
        found = await self._store.get(_name(session_id)) if _is_id(session_id) else None
        if found is None:
            raise Unauthorized("log in first")
        value = orjson.loads(found)
        if not hmac.compare_digest(value["proof"], self._proof(session_id)):
            raise Unauthorized("the password was changed; log in again")
        session = ConsoleSession(session_id, value["csrf"])
        if request.method not in ("GET", "HEAD"):
            given = request.headers.get(CSRF_HEADER, "")
            if not _equal(given, session.csrf):
                raise Forbidden(f"the header {CSRF_HEADER} must have the token of this session")
        return session

    async def logout(self, session: ConsoleSession) -> None:
        """End the session on all workers."""
        await self._store.delete(_name(session.id))

    def set_cookie(self, request: web.Request, response: web.Response, session_id: str) -> None:
        """Store the session in the browser; '' removes it."""
        # A proxy that is not in [server] trusted_proxies may end TLS. The browser's Origin then has
        # the public scheme.
        has_public_scheme = request.headers.get("Origin", "").startswith("https://")
        response.set_cookie(
            COOKIE,
            session_id,
            max_age=SESSION_S if session_id else 0,
            # That of the API, as the browser sees it: a proxy may have removed a prefix.
            path="",
            httponly=True,
            samesite="Strict",
            secure=has_public_scheme or is_secure(request),
        )

    def _proof(self, session_id: str) -> str:
        passwords = "\n".join(self._passwords()).encode(errors="surrogatepass")
        return hmac.digest(session_id.encode(), passwords, "sha256").hex()


def _equal(one: str, other: str) -> bool:
    """Return True if the texts are equal. The time does not depend on their content."""
    first, second = (
        hashlib.sha256(text.encode(errors="surrogatepass")).digest() for text in (one, other)
    )
    return hmac.compare_digest(first, second)


def _is_id(text: str) -> bool:
    return len(text) == 43 and text.isascii()


def _name(session_id: str) -> str:
    # Redis stores a hash only, from which no valid cookie can be made.
    return f"console:session:{hashlib.sha256(session_id.encode()).hexdigest()}"
