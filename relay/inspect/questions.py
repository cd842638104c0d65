"""Ask all workers of all hosts a question, and collect their answers within a time limit.

The command line and the admin API use the same questions. Question and answer are JSON objects that
travel over the message bus of the workers (`relay.stream.cluster.bus`):

    topic "question": {"id": "3f..", "ask": "connections", "with": {...}, "within_s": 2.0}
    topic "answer":   {"id": "3f..", "answer": {...}} or {"id": "3f..", "error": "..."}

Only programs that may publish to the bus in Redis can ask. A worker answers few questions at a
time. Handlers limit the size of an answer and do long work in slices.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import orjson

from relay.core.errors import RelayError, Unavailable
from relay.stream.cluster.bus import ClusterBus
from relay.stream.cluster.workers import list_workers, new_instance

if TYPE_CHECKING:
    from relay.config.settings import RedisSettings
    from relay.stream.connection.connect import RedisClient
    from relay.stream.format.keys import Keys
    from relay.stream.shards.clients import ShardClients

_log = logging.getLogger(__name__)

_QUESTION, _ANSWER = "question", "answer"
WITHIN_S = 2.0
_CONNECT_S = 5.0
_LONGEST_S = 30.0
# Questions that a worker answers at the same time. Further ones are rejected.
_AT_ONCE = 8

# Parameters of a question, or the values of an answer.
Values = Mapping[str, Any]
Handler = Callable[[Values], Awaitable[dict[str, Any]]]


class BadQuestion(RelayError):
    """The question's values are not valid. The text is sent to the operator."""


@dataclass(slots=True, kw_only=True)
class WorkerAnswers:
    """The workers' answers by instance.

    `silent` are workers that have not answered in time, `failed` those that could not answer, with
    the reason.
    """

    by_worker: dict[str, dict[str, Any]] = field(default_factory=dict)
    silent: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


class Questions:
    """Asks questions, and answers those of others if handlers are set."""

    def __init__(
        self,
        bus: ClusterBus,
        *,
        client: RedisClient,
        keys: Keys,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        """`spawn` starts a task that answers one question."""
        self._bus = bus
        self._client = client
        self._keys = keys
        self._spawn = spawn
        self._handlers: dict[str, Handler] = {}
        self._waiting: dict[str, Callable[[str, dict[str, Any]], None]] = {}
        self._working = 0
        bus.listen(_QUESTION, self._on_question)
        bus.listen(_ANSWER, self._on_answer)

    # ---- answer -----------------------------------------------------------------------------

    def answer(self, name: str, handler: Handler) -> None:
        """Set the handler of a question. It raises BadQuestion if the values are not valid."""
        self._handlers[name] = handler

    def _on_question(self, sender: str, payload: bytes) -> None:
        try:
            asked = orjson.loads(payload)
            number, name, values = str(asked["id"]), asked["ask"], dict(asked["with"])
            within_s = min(float(asked.get("within_s", WITHIN_S)), _LONGEST_S)
        except (ValueError, KeyError, TypeError):
            _log.warning("Ignored a malformed question on the bus")
            return
        handler = self._handlers.get(name)
        if handler is None:
            self._send(sender, number, {"error": "unknown to this version of relay"})
        elif self._working >= _AT_ONCE:
            self._send(sender, number, {"error": "too many questions at the same time"})
        else:
            self._working += 1
            self._spawn(self._work(sender, number, partial(handler, values), within_s))

    async def _work(
        self,
        sender: str,
        number: str,
        handle: Callable[[], Awaitable[dict[str, Any]]],
        within_s: float,
    ) -> None:
        try:
            # The asker does not wait longer. Further work would only delay the next question.
            async with asyncio.timeout(within_s):
                answer: dict[str, Any] = {"answer": await handle()}
        except TimeoutError:
            answer = {"error": f"the worker is busy: no answer within {within_s:g} s"}
        except (BadQuestion, Unavailable) as exc:
            answer = {"error": str(exc)}
        finally:
            self._working -= 1
        self._send(sender, number, answer)

    def _send(self, address: str, number: str, answer: Values) -> None:
        self._bus.send(address, _ANSWER, orjson.dumps({"id": number, **answer}))

    # ---- ask --------------------------------------------------------------------------------

    async def ask(self, name: str, values: Values, *, within_s: float = WITHIN_S) -> WorkerAnswers:
        """Ask all workers. Return when all have answered, or after `within_s`.

        Raises:
            RelayError: Redis is unreachable, so that the list of workers cannot be read.
        """
        living, silent = await list_workers(self._client, self._keys)
        workers = {each.instance.rpartition(":")[2]: each.instance for each in living}
        found = WorkerAnswers(silent=silent)
        number = secrets.token_hex(8)
        complete = asyncio.Event()

        def received(address: str, answer: dict[str, Any]) -> None:
            instance = workers.pop(address, None)
            if instance is None:
                return
            if isinstance(answer.get("answer"), dict):
                found.by_worker[instance] = answer["answer"]
            else:
                found.failed[instance] = str(answer.get("error", "malformed answer"))
            if not workers:
                complete.set()

        self._waiting[number] = received
        payload = orjson.dumps({"id": number, "ask": name, "with": values, "within_s": within_s})
        try:
            for address in list(workers):
                self._bus.send(address, _QUESTION, payload)
            if workers:
                async with asyncio.timeout(within_s):
                    await complete.wait()
        except TimeoutError:
            pass
        finally:
            del self._waiting[number]
        found.silent += sorted(workers.values())
        return found

    def _on_answer(self, sender: str, payload: bytes) -> None:
        try:
            answer = orjson.loads(payload)
            received = self._waiting.get(answer["id"])
        except (ValueError, KeyError, TypeError):
            return
        if received is not None:
            received(sender, answer)


@asynccontextmanager
async def asking(
    redis: RedisSettings, clients: ShardClients, keys: Keys
) -> AsyncIterator[Questions]:
    """Open the bus for a program that is not a worker, such as the command line.

    Raises:
        RelayError: The bus could not be opened.
    """
    bus = ClusterBus(
        shards=clients.shards, redis=redis, keys=keys, instance=new_instance("operator")
    )
    failure: RelayError | None = None
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(bus.links.run())
        try:
            try:
                async with asyncio.timeout(_CONNECT_S):
                    await bus.links.wait_home_open()
            except TimeoutError:
                raise RelayError(
                    f"could not subscribe to the workers' answers within {_CONNECT_S:.0f} s: Redis"
                    " is unreachable, or its user lacks +subscribe (docs/redis.md, 'Create Redis"
                    " users')"
                ) from None
            yield Questions(bus, client=clients.home, keys=keys, spawn=tasks.create_task)
        except RelayError as exc:
            # The group would wrap it.
            failure = exc
        finally:
            running.cancel()
    if failure is not None:
        raise failure
