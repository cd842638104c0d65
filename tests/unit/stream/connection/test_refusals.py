"""What Redis refuses now, as the log and `relay status` name it."""

from __future__ import annotations

from relay.stream.connection.refusals import WRITES, Refusals

FULL = "OOM command not allowed when used memory > 'maxmemory'."


def test_a_function_that_may_write_again_ends_the_refusal_of_all_writes() -> None:
    refusals = Refusals("127.0.0.1:6379")
    refusals.refused("heartbeats", FULL)
    refusals.refused("counts", FULL)
    refusals.accepted("reads")
    assert refusals.has(WRITES)
    assert str(refusals).startswith("Redis at 127.0.0.1:6379 refuses")
    refusals.accepted("counts")
    assert not refusals.has(WRITES)
    assert str(refusals) == ""
