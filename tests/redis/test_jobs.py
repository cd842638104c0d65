"""relay/process/jobs.py on real servers."""

from __future__ import annotations

import asyncio
import io
import logging
from collections.abc import Callable

import pytest
from redis.asyncio import Redis

from relay.core.errors import RedisUnavailable, Unavailable
from relay.process import logs
from relay.process.jobs import JobScheduler, PeriodicJob
from relay.stream.connection.connect import CommandRefused, RefusedForNow
from relay.stream.format.keys import Keys
from tests.support.clients import within

pytestmark = pytest.mark.redis


async def _sets(admin: Redis) -> int:
    return int((await admin.info("commandstats")).get("cmdstat_set", {"calls": 0})["calls"])


def scheduler(
    client: Redis,
    keys: Keys,
    instance: str,
    *jobs: PeriodicJob,
    is_connected: Callable[[], bool] = lambda: True,
) -> JobScheduler:
    return JobScheduler(
        client=client, keys=keys, instance=instance, jobs=jobs, is_connected=is_connected
    )


async def test_a_bug_in_a_job_ends_the_task_group(client: Redis, keys: Keys) -> None:
    async def wrong() -> None:
        raise KeyError("a bug")

    job = PeriodicJob(name="wrong", every_s=60, run=wrong, at_once=True, if_late="")
    with pytest.raises(ExceptionGroup) as raised:
        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            group.create_task(scheduler(client, keys, "one", job).run())
    (bug,) = raised.value.exceptions
    assert isinstance(bug, KeyError)
    assert bug.__notes__ == ["raised by the periodic job wrong"]


async def test_an_expected_error_is_logged_and_the_job_runs_again(
    client: Redis, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    runs, again = 0, asyncio.Event()

    async def unlucky() -> None:
        nonlocal runs
        runs += 1
        if runs == 2:
            again.set()
        raise RedisUnavailable("10.0.0.5:6379 does not answer")

    job = PeriodicJob(name="unlucky", every_s=0.05, run=unlucky, if_late="")
    with caplog.at_level(logging.WARNING):
        async with asyncio.TaskGroup() as group:
            task = group.create_task(scheduler(client, keys, "one", job).run())
            await within(30, again.wait())
            task.cancel()
    expected = "Skipped job unlucky: 10.0.0.5:6379 does not answer; next run in 0.05 s"
    assert expected in caplog.messages


async def test_jobs_do_not_repeat_what_the_reader_logs_about_a_lost_connection(
    client: Redis, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    errors = [
        RedisUnavailable("10.0.0.5:6379 refuses the password"),
        Unavailable("Redis is unreachable"),
        CommandRefused("SADD", "NOPERM no right"),
        RefusedForNow("SET", "OOM full"),
    ]
    messages: list[str] = []
    again = asyncio.Event()

    async def unlucky() -> None:
        if not errors:
            again.set()
            return
        error = errors.pop(0)
        messages.append(f"Skipped job unlucky: {error}; next run in 0.01 s")
        raise error

    job = PeriodicJob(name="unlucky", every_s=0.01, run=unlucky, if_late="")
    with caplog.at_level(logging.DEBUG):
        async with asyncio.TaskGroup() as group:
            lost = scheduler(client, keys, "one", job, is_connected=lambda: False)
            task = group.create_task(lost.run())
            await within(30, again.wait())
            task.cancel()
    levels = {each.message: each.levelname for each in caplog.records}
    assert [levels[text] for text in messages] == ["DEBUG", "DEBUG", "WARNING", "WARNING"]


async def test_a_job_that_takes_longer_than_its_period_is_logged_with_the_consequence(
    client: Redis, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    runs, skipped = 0, asyncio.Event()

    async def slow() -> None:
        await skipped.wait()

    async def quick() -> None:
        nonlocal runs
        runs += 1
        if runs == 10:
            skipped.set()

    written = io.StringIO()
    log = logs.RepeatLimiter(logging.StreamHandler(written))
    # The levels are restored after the test.
    for name in None, "apscheduler":
        caplog.set_level(logging.INFO, name)
    logs.set_level("info")
    logging.getLogger().addHandler(log)
    jobs = [
        PeriodicJob(name="slow", every_s=0.01, run=slow, if_late="events are late"),
        # While it runs ten times, `slow` is due many times.
        PeriodicJob(name="quick", every_s=0.1, run=quick, if_late=""),
    ]
    try:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(scheduler(client, keys, "one", *jobs).run())
            await within(30, skipped.wait())
            task.cancel()
    finally:
        logging.getLogger().removeHandler(log)
        log.close()
    line = (
        "Job slow took longer than its period of 0.01 s and skipped a run: events are late. "
        "If this repeats, check the CPU load of this host and the latency of Redis"
    )
    # A busy machine may delay the other job as well.
    first, count = (each for each in written.getvalue().splitlines() if "quick" not in each)
    assert first == line
    assert count.startswith(f"{line} (repeated ")


async def test_one_worker_runs_a_shared_job_until_it_leaves(
    client: Redis, admin: Redis, keys: Keys
) -> None:
    runs: list[str] = []
    changed = asyncio.Event()

    def job(instance: str) -> PeriodicJob:
        async def run() -> None:
            runs.append(instance)
            changed.set()

        # The lease outlasts the test, so that only its release lets the other worker begin.
        return PeriodicJob(name="trim", every_s=20, run=run, at_once=True, shared=True, if_late="")

    async def next_run() -> None:
        changed.clear()
        await changed.wait()

    first, second = (scheduler(client, keys, name, job(name)) for name in ("one", "two"))
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(first.run())]
        await within(30, next_run())
        tries = await _sets(admin)
        tasks.append(group.create_task(second.run()))
        # Its attempt to get the lease is one SET ... NX.
        while await _sets(admin) < tries + 1:
            await asyncio.sleep(0.01)
        assert runs == ["one"]
        await first.leave()
        third = scheduler(client, keys, "three", job("three"))
        tasks.append(group.create_task(third.run()))
        await within(30, next_run())
        for task in tasks:
            task.cancel()
    assert runs == ["one", "three"]


async def test_a_job_that_is_not_wanted_takes_no_lease(
    client: Redis, admin: Redis, keys: Keys
) -> None:
    asked = asyncio.Event()

    def is_wanted() -> bool:
        asked.set()
        return False

    async def run() -> None:
        raise AssertionError

    job = PeriodicJob(
        name="trim", every_s=60, run=run, at_once=True, shared=True, is_wanted=is_wanted, if_late=""
    )
    async with asyncio.TaskGroup() as group:
        task = group.create_task(scheduler(client, keys, "one", job).run())
        await within(30, asked.wait())
        task.cancel()
    assert await admin.keys() == []


async def test_the_end_of_the_scheduler_waits_for_running_jobs(client: Redis, keys: Keys) -> None:
    started, ended = asyncio.Event(), False

    async def slow() -> None:
        nonlocal ended
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended = True

    job = PeriodicJob(name="slow", every_s=60, run=slow, at_once=True, if_late="")
    async with asyncio.TaskGroup() as group:
        task = group.create_task(scheduler(client, keys, "one", job).run())
        await within(30, started.wait())
        task.cancel()
    assert ended
