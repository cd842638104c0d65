"""Asks the application whether somebody may read a channel.

Fails closed: whatever is not a plain yes within the time limit is a no. Nobody is asked twice at
once for the same thing, and never more than 64 questions are under way.
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
from relay.core.errors import ConfigError
from relay.core.model import Channel, Principal
from relay.rights.cache import Answers, Question, concerns

log = logging.getLogger(__name__)

CONCURRENT = 64
CACHED = 100_000
# A failure is nobody's answer: held just long enough to spare an application that is down.
ERROR_HOLD_S = 1.0
# Waiting for one's turn has a limit too, or a reconnect storm on a dead application would hang.
_TURN_TIMEOUTS = 10
_LIMIT_ANSWER_BYTES = 65536
# An application that drops an answer each time that it gives one would be asked for ever.
_ROUNDS = 10


class _Failed(Exception):
    """No answer; the text is for the log."""


class _Asking:
    """One question under way. `answer` None once done: whoever asked has gone away."""

    __slots__ = ("answer", "done", "dropped")

    def __init__(self) -> None:
        self.done = asyncio.Event()
        self.answer: bool | None = None
        self.dropped = False


class HttpRights:
    """One application under one set of settings; after a reload there is a new one.

    `session` belongs to the caller. It should keep no cookies: the questions are about different
    users.
    """

    def __init__(
        self,
        settings: RightsSettings,
        session: aiohttp.ClientSession,
        *,
        clock: Callable[[], float] = time.monotonic,
        cached: int = CACHED,
    ) -> None:
        """ConfigError where `http_url` cannot be asked."""
        try:
            url = urlsplit(settings.http_url)
            good = url.scheme in ("http", "https") and bool(url.hostname) and "@" not in url.netloc
        except ValueError:
            good = False
        if not good:
            # Not quoted: it may hold a password, which would also fight with our bearer token.
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
        self._asking: dict[Question, _Asking] = {}
        self._turns = asyncio.Semaphore(CONCURRENT)
        self._failing = False

    def cached(self, principal: Principal, channel: Channel) -> bool | None:
        """The answer that still holds, without asking; None where there is none."""
        return self._answers.get(_question(principal, channel))

    def expires_in(self, principal: Principal, channel: Channel) -> float | None:
        """Seconds until `cached` turns to None; None where it already is."""
        return self._answers.expires_in(_question(principal, channel))

    def drop(self, channel: Channel | None = None, user: str | None = None) -> None:
        """Forgets what the application said about them; None stands for every one.

        A question under way is put again: its answer may be older than this call.
        """
        self._answers.drop(channel, user)
        for question, asking in self._asking.items():
            if concerns(question, channel, user):
                asking.dropped = True

    async def ask(self, principal: Principal, channel: Channel) -> bool:
        """Whether the application lets `principal` read `channel`; never raises for its sake."""
        question = _question(principal, channel)
        for _ in range(_ROUNDS):
            held = self._answers.get(question)
            if held is not None:
                return held
            asking = self._asking.get(question)
            if asking is None:
                answer = await self._lead(question)
            else:
                await asking.done.wait()
                # Dropped or abandoned: one of those who waited asks again, the others join it.
                answer = None if asking.dropped else asking.answer
            if answer is not None:
                return answer
        return False

    async def _lead(self, question: Question) -> bool | None:
        asking = self._asking[question] = _Asking()
        try:
            try:
                answer = await self._turn(question)
                hold_s = self._settings.http_cache_s
            except _Failed as exc:
                self._log_failure(str(exc))
                answer = False
                hold_s = min(ERROR_HOLD_S, self._settings.http_cache_s)
            else:
                self._log_success()
            if asking.dropped:
                return None
            self._answers.put(question, answer, hold_s)
            asking.answer = answer
            return answer
        finally:
            del self._asking[question]
            asking.done.set()

    async def _turn(self, question: Question) -> bool:
        try:
            async with asyncio.timeout(self._timeout_s * _TURN_TIMEOUTS):
                await self._turns.acquire()
        except TimeoutError:
            raise _Failed("too many questions wait for it") from None
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._post(question)
        except TimeoutError:
            raise _Failed(f"no answer within {self._settings.http_timeout_ms} ms") from None
        except (aiohttp.ClientError, OSError, ValueError) as exc:
            # Its text can hold the URL and what was received; its kind says enough.
            raise _Failed(type(exc).__name__) from None
        finally:
            self._turns.release()

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
            # A redirect would carry the bearer token to whoever it names.
            allow_redirects=False,
        ) as response:
            if response.status != 200:
                raise _Failed(f"status {response.status}; 200 with read true or false is expected")
            text = b""
            async for chunk in response.content.iter_chunked(_LIMIT_ANSWER_BYTES):
                text += chunk
                if len(text) > _LIMIT_ANSWER_BYTES:
                    raise _Failed(f"an answer of more than {_LIMIT_ANSWER_BYTES} bytes")
        try:
            answer = json.loads(text)
        except RecursionError:
            answer = None
        read = answer.get("read") if isinstance(answer, dict) else None
        # `1` or "true" is a mistake at the other end: not the place to guess kindly.
        if not isinstance(read, bool):
            raise _Failed("an answer without read: true or false")
        return read

    # One line when it begins to fail and one when it ends, not one for every client.
    def _log_failure(self, reason: str) -> None:
        if not self._failing:
            self._failing = True
            log.warning("rights: the application at http_url gives no answer: %s", reason)

    def _log_success(self) -> None:
        if self._failing:
            self._failing = False
            log.info("rights: the application at http_url answers again")


def _question(principal: Principal, channel: Channel) -> Question:
    return Question(principal.user, principal.groups, channel)
