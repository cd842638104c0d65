"""How many connections a command `disconnect` has closed, on all workers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from relay.inspect.questions import Questions

QUESTION = "closed-by"
_WITHIN_S = 5.0


async def closed_by(questions: Questions, entry_id: str) -> tuple[int, list[str]]:
    """Return the number of closed connections, and why it may be too small.

    Args:
        entry_id: The command's entry in the control stream.
    """
    answers = await questions.ask(QUESTION, {"command": entry_id}, within_s=_WITHIN_S)
    problems = [
        f"{instance} has not confirmed the command; its connections are not counted"
        for instance in [*answers.silent, *answers.failed]
    ]
    return sum(int(each["closed"]) for each in answers.by_worker.values()), problems
