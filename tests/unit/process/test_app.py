"""The tasks of a relay while it ends after an error."""

from __future__ import annotations

import asyncio

import pytest

from relay.config.loading import load as load_config
from relay.process.app import Relay


async def test_a_relay_that_is_ending_runs_no_new_tasks() -> None:
    config = load_config(None, environ={}, overrides=[], flags={}, doors={})
    relay = Relay(config, reload=lambda: config, on_ready=lambda *_: None)
    was_run = False

    async def fail() -> None:
        raise ValueError("a bug")

    async def late() -> None:
        nonlocal was_run
        was_run = True

    async def ending() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            # A connection that another worker passes on, for example.
            await relay._spawn(late(), name="late")

    async def run() -> None:
        async with asyncio.TaskGroup() as relay._background:
            tasks = [relay._spawn(ending(), name="ending"), relay._spawn(fail(), name="fail")]
            await asyncio.wait(tasks)

    with pytest.raises(ExceptionGroup) as ended:
        await run()
    assert [str(each) for each in ended.value.exceptions] == ["a bug"]
    assert not was_run
