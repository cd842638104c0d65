"""Tokens expire within a second. Each has one queue entry, however often it is renewed."""

from __future__ import annotations

import asyncio
import random

from relay.core.model import Channel
from relay.protocols.seafile.expiries import Expiries

A, B = Channel("seafile:a"), Channel("seafile:b")


class Holder:
    def __init__(self) -> None:
        self.watched: dict[Channel, int] = {}
        self.tokens: dict[Channel, int] = {}
        self.expired: list[Channel] = []

    def expires_at(self, channel: Channel) -> int | None:
        return self.tokens.get(channel)

    def expire(self, channel: Channel) -> None:
        del self.tokens[channel]
        self.expired.append(channel)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


async def test_expires_within_the_second_and_respects_renewals() -> None:
    clock, one, other = Clock(), Holder(), Holder()
    expiries = Expiries(asyncio.get_running_loop, clock)
    for holder, channel, at in ((one, A, 105), (one, B, 103), (other, A, 104)):
        holder.tokens[channel] = at
        expiries.watch(holder, channel, at)
    one.tokens[B] = 110
    expiries.watch(one, B, 110)
    clock.now = 103.9
    expiries.expire_due()
    assert (one.expired, other.expired) == ([], [])
    clock.now = 104.0
    expiries.expire_due()
    assert (one.expired, other.expired) == ([], [A])
    clock.now = 110
    expiries.expire_due()
    assert one.expired == [A, B]
    assert len(expiries) == 0


async def test_a_shorter_token_applies_at_once() -> None:
    clock, one = Clock(), Holder()
    expiries = Expiries(asyncio.get_running_loop, clock)
    for at in (200, 150, 300, 120):
        one.tokens[A] = at
        expiries.watch(one, A, at)
    clock.now = 120
    expiries.expire_due()
    assert one.expired == [A]


async def test_repeated_renewals_need_few_entries() -> None:
    clock, one = Clock(), Holder()
    expiries = Expiries(asyncio.get_running_loop, clock)
    chance = random.Random(7)
    for _ in range(10_000):
        if chance.random() < 0.3:
            one.tokens.pop(A, None)
        else:
            one.tokens[A] = at = chance.randrange(200, 260)
            expiries.watch(one, A, at)
    assert len(expiries) < 20


async def test_ignores_deleted_holders() -> None:
    clock = Clock()
    expiries = Expiries(asyncio.get_running_loop, clock)
    expiries.watch(Holder(), A, 105)
    clock.now = 105
    expiries.expire_due()
    assert len(expiries) == 0


async def test_many_expired_tokens_are_processed_in_several_turns() -> None:
    clock, one = Clock(), Holder()
    expiries = Expiries(asyncio.get_running_loop, clock)
    clock.now = 105
    channels = [Channel(f"seafile:{number}") for number in range(1000)]
    for channel in channels:
        one.tokens[channel] = 105
        expiries.watch(one, channel, 105)
    most = before = 0
    async with asyncio.timeout(30):
        while len(one.expired) < len(channels):
            await asyncio.sleep(0)
            most, before = max(most, len(one.expired) - before), len(one.expired)
    assert most <= 100
    assert one.expired == channels
