"""Ask the application over HTTP whether a user may read a channel.

Access is denied unless the application answers `"read": true` within the time limit. Concurrent
requests about the same user and channel are sent once, and at most 64 requests run at a time.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import aiohttp

from relay.config.settings import RightsSettings
from relay.core.coalescing import RequestCoalescer
from relay.core.errors import ConfigError
from relay.core.model import Channel, Principal
from relay.rights.cache import Answers, Question, concerns

_log = logging.getLogger(__name__)

CONCURRENT = 64
CACHED = 100_000
# Cache a failure only as long as needed to spare an application that is unreachable.
ERROR_HOLD_S = 1.0
# Limit the wait for one of the concurrent requests too: otherwise clients would wait very long for
# an application that does not answer.
_QUEUE_TIMEOUTS = 10
_LIMIT_RESPONSE_BYTES = 65536
# Limit the repetitions for an application that drops the cached answer with every request.
_ROUNDS = 10


class _Failed(Exception):
    """The application gave no valid answer. The text is for the log."""


class HttpRights:
    """Client for one application with one set of settings. A reload creates a new one.

    The HTTP session is owned by the caller and must not store cookies, because the requests are
    about different users.
    """

    def __init__(
        self,
        settings: RightsSettings,
        session: aiohttp.ClientSession,
        *,
        clock: Callable[[], float] = time.monotonic,
        cached: int = CACHED,
    ) -> None:
        """Raise ConfigError if `http_url` is not a URL that can be requested."""
        try:
            url = urlsplit(settings.http_url)
            good = url.scheme in ("http", "https") and bool(url.hostname) and "@" not in url.netloc
        except ValueError:
            good = False
        if not good:
            # Don't quote the URL: it may contain a password. A password in it is rejected because
            # it would conflict with the bearer token.
            raise ConfigError(
                "[rights] http_url: allowed is http://HOST... or https://HOST... without a user"
            )
        self._settings = settings
        self._session = session
        self._timeout_s = settings.http_timeout_ms / 1000
        self._headers = {"Accept": "application/json"}
        if token := settings.http_token.get_secret_value():
            self._headers["Authorization"] = f"Bearer {token}"
        self._answers = Answers(limit=cached, clock=clock)
        self._requests: RequestCoalescer[Question, bool | None] = RequestCoalescer()
        # Running requests whose answer may be older than a call of `drop`.
        self._dropped: set[Question] = set()
        self._slots = asyncio.Semaphore(CONCURRENT)
        self._failing = False

    def cached(self, principal: Principal, channel: Channel) -> bool | None:
        """Return the cached answer, or None if there is none."""
        return self._answers.get(_question(principal, channel))

    def expires_in(self, principal: Principal, channel: Channel) -> float | None:
        """Return the seconds until the cached answer expires, or None if there is none."""
        return self._answers.expires_in(_question(principal, channel))

    def drop(self, channel: Channel | None = None, user: str | None = None) -> None:
        """Remove the cached answers about this channel and user. None means all.

        Requests that are running are repeated, because their answer may be older than this call.
        """
        self._answers.drop(channel, user)
        self._dropped.update(
            question for question in self._requests.running() if concerns(question, channel, user)
        )

    async def ask(self, principal: Principal, channel: Channel) -> bool:
        """Return True if the application lets `principal` read `channel`. Errors count as no."""
        question = _question(principal, channel)
        for _ in range(_ROUNDS):
            answer = self._answers.get(question)
            if answer is None:
                answer = await self._requests.run(question, self._request)
            if answer is not None:
                return answer
        return False

    async def _request(self, question: Question) -> bool | None:
        """Return the answer, or None if `drop` was called meanwhile."""
        try:
            try:
                answer = await self._post_in_turn(question)
                hold_s = self._settings.http_cache_s
            except _Failed as exc:
                self._log_failure(str(exc))
                answer = False
                hold_s = min(ERROR_HOLD_S, self._settings.http_cache_s)
            else:
                self._log_success()
            if question in self._dropped:
                return None
            self._answers.put(question, answer, hold_s)
            return answer
        finally:
            self._dropped.discard(question)

    async def _post_in_turn(self, question: Question) -> bool:
        try:
            async with asyncio.timeout(self._timeout_s * _QUEUE_TIMEOUTS):
                await self._slots.acquire()
        except TimeoutError:
            raise _Failed(f"{CONCURRENT} earlier requests are still waiting") from None
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._post(question)
        except TimeoutError:
            raise _Failed(f"no response within {self._settings.http_timeout_ms} ms") from None
        except (aiohttp.ClientError, OSError, ValueError) as exc:
            # Don't log the text: it can contain the URL and the response.
            raise _Failed(type(exc).__name__) from None
        finally:
            self._slots.release()

    async def _post(self, question: Question) -> bool:
        body = {
            "user": question.user,
            "channel": question.channel,
            "groups": sorted(question.groups),
        }
        async with self._session.post(
            self._settings.http_url,
            json=body,
            headers=self._headers,
            # A redirect would send the bearer token to another server.
            allow_redirects=False,
        ) as response:
            if response.status != 200:
                raise _Failed(f"status {response.status}; expected 200")
            text = b""
            async for chunk in response.content.iter_chunked(_LIMIT_RESPONSE_BYTES):
                text += chunk
                if len(text) > _LIMIT_RESPONSE_BYTES:
                    raise _Failed(f"response exceeds {_LIMIT_RESPONSE_BYTES} bytes")
        try:
            answer = json.loads(text)
        except RecursionError:
            answer = None
        read = answer.get("read") if isinstance(answer, dict) else None
        # Don't accept 1 or "true": in the application they are mistakes.
        if not isinstance(read, bool):
            raise _Failed('response is not JSON with "read": true or false')
        return read

    # Log the first failure and the first success after it, not each request.
    def _log_failure(self, reason: str) -> None:
        if not self._failing:
            self._failing = True
            _log.warning(
                "Rights request to [rights] http_url failed: %s; access is denied",
                reason,
            )

    def _log_success(self) -> None:
        if self._failing:
            self._failing = False
            _log.info("Rights requests to [rights] http_url succeed again")


def _question(principal: Principal, channel: Channel) -> Question:
    return Question(principal.user, principal.groups, channel)
