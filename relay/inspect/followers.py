"""Count the clients that follow a channel, by protocol, on all workers."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from relay.core.model import Channel
from relay.core.slices import in_slices
from relay.inspect.questions import BadQuestion

if TYPE_CHECKING:
    from collections.abc import Sequence

    from relay.hub.hub import Hub
    from relay.inspect.questions import Questions, Values

QUESTION = "followers"
# Channels in one question.
MOST = 500


class Followers:
    """Counts this worker's subscriptions."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    async def answer(self, values: Values) -> dict[str, Any]:
        """Answer the question `followers`. Channels without followers are omitted."""
        channels = values.get("channels")
        if not isinstance(channels, list) or len(channels) > MOST:
            raise BadQuestion(f"channels must be a list of at most {MOST} names")
        found: dict[str, dict[str, int]] = {}
        for name in channels:
            feed = self._hub.feed(Channel(name)) if isinstance(name, str) else None
            if feed is None:
                continue
            counts: Counter[str] = Counter()
            async for subscription in in_slices(list(feed.subscriptions())):
                counts[subscription.session.principal.door] += 1
            found[name] = dict(counts)
        return {"followers": found}


async def count_followers(
    questions: Questions, channels: Sequence[Channel]
) -> dict[Channel, dict[str, int]]:
    """Return the number of followers by channel and protocol. Workers that do not answer in time
    are not counted."""
    totals: dict[Channel, Counter[str]] = {channel: Counter() for channel in channels}
    if channels:
        answers = await questions.ask(QUESTION, {"channels": list(channels)})
        for answer in answers.by_worker.values():
            for channel, counts in answer["followers"].items():
                totals[channel].update(counts)
    return {channel: dict(counts) for channel, counts in totals.items()}
