"""Ask the application over HTTP whether a user may read a channel.

Access is denied unless the application answers `"read": true` within the time limit. Concurrent
requests about the same user and channel are sent once, and at most 64 requests run at a time.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import aiohttp

from relay.config.settings import RightsSettings
from relay.core.coalescing import RequestCoalescer
from relay.core.errors import ConfigError
from relay.core.model import Channel, Principal
from relay.rights.application import ApplicationRequests, InvalidResponse, read_response
from relay.rights.cache import Answers, Question, concerns

CONCURRENT = 64
CACHED = 100_000
# Cache a failure only as long as needed to spare an application that is unreachable.
ERROR_HOLD_S = 1.0
_QUEUE_TIMEOUTS = 10
_LIMIT_RESPONSE_BYTES = 65536
# Limit the repetitions for an application that drops the cached answer with every request.
_ROUNDS = 10


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
        self._application = ApplicationRequests(
            "Rights request to [rights] http_url",
            concurrent=CONCURRENT,
            queue_timeouts=_QUEUE_TIMEOUTS,
            consequence="access is denied",
        )

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
                async with self._application.request(self._timeout_s, question.user):
                    answer = await self._post(question)
                hold_s = self._settings.http_cache_s
            except InvalidResponse:
                answer = False
                hold_s = min(ERROR_HOLD_S, self._settings.http_cache_s)
            if question in self._dropped:
                return None
            self._answers.put(question, answer, hold_s)
            return answer
        finally:
            self._dropped.discard(question)

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
            text = await read_response(response, _LIMIT_RESPONSE_BYTES)
        try:
            answer = json.loads(text)
        except RecursionError:
            answer = None
        read = answer.get("read") if isinstance(answer, dict) else None
        # Don't accept 1 or "true": in the application they are mistakes.
        if not isinstance(read, bool):
            raise InvalidResponse('response is not JSON with "read": true or false')
        return read


def _question(principal: Principal, channel: Channel) -> Question:
    return Question(principal.user, principal.groups, channel)
