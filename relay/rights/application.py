"""Requests to an application over HTTP that cannot keep its callers waiting without limit."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp

_log = logging.getLogger(__name__)


class InvalidResponse(Exception):
    """The application gave no valid answer. The text is for the log and quotes no secrets."""


class RejectedRequest(InvalidResponse):
    """The application answered with an error status, whoever the request is about."""


class ApplicationRequests:
    """Limits the number and the time of requests, and logs the first failure of several.

    An answer that is not usable concerns one user only, who is named in the log.

    The wait for one of the concurrent requests is limited too: otherwise clients would wait very
    long for an application that does not answer.
    """

    def __init__(
        self, request: str, *, concurrent: int, queue_timeouts: int, consequence: str
    ) -> None:
        """Prepare for requests.

        Args:
            request: What the log calls such a request.
            concurrent: Requests that run at a time.
            queue_timeouts: How many times the time limit of a request it may wait for its turn.
            consequence: What the log says about an application that fails.
        """
        self._request = request
        self._consequence = consequence
        self._concurrent = concurrent
        self._queue_timeouts = queue_timeouts
        self._slots = asyncio.Semaphore(concurrent)
        self._failing = False

    @asynccontextmanager
    async def request(self, timeout_s: float, about: str) -> AsyncIterator[None]:
        """Make one request, including the check of its response, in the body of `async with`.

        `about` names its user in the log.

        Raises:
            InvalidResponse: The request failed, took too long or was given no turn in time.
        """
        try:
            async with asyncio.timeout(timeout_s * self._queue_timeouts):
                await self._slots.acquire()
        except TimeoutError:
            raise self._failed(f"{self._concurrent} earlier requests are still waiting") from None
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except TimeoutError:
            raise self._failed(f"no response within {timeout_s:g} s") from None
        except RejectedRequest as exc:
            raise self._failed(str(exc)) from None
        except InvalidResponse as exc:
            # The application works, and its answers about others may be good.
            _log.warning(
                "%s about %s failed: %s; access is denied or not updated for this user",
                self._request,
                about,
                exc,
            )
            raise
        except (aiohttp.ClientError, OSError, ValueError) as exc:
            # Don't log the text: it can contain the URL with its secrets, and the response.
            raise self._failed(type(exc).__name__) from None
        finally:
            self._slots.release()
        if self._failing:
            self._failing = False
            _log.info("%s succeeded again", self._request)

    def _failed(self, reason: str) -> InvalidResponse:
        if not self._failing:
            self._failing = True
            _log.warning("%s failed: %s; %s", self._request, reason, self._consequence)
        return InvalidResponse(reason)


async def read_response(response: aiohttp.ClientResponse, limit_bytes: int) -> bytes:
    """Return the body of a response with status 200.

    Raises:
        InvalidResponse: It has another status, or its body exceeds the limit.
    """
    if response.status != 200:
        raise RejectedRequest(f"status {response.status}; expected 200")
    body = bytearray()
    async for chunk in response.content.iter_chunked(65536):
        body += chunk
        if len(body) > limit_bytes:
            raise InvalidResponse(f"response exceeds {limit_bytes} bytes")
    return bytes(body)
