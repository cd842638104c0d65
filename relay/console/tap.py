"""The live tap of all workers."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

from relay.inspect import tap as inspect_tap

if TYPE_CHECKING:
    from relay.console.services import ApiRequest

# Of all workers together.
_RECORDS = 500


async def tap(request: ApiRequest) -> object:
    """Return the records since the last request with the same `watch`."""
    watch = request.text("watch", "") or secrets.token_hex(8)
    filters = {name: request.text(name, "") for name in ("channel", "user", "connection")}
    answers = await inspect_tap.watch(request.services.questions, {"watch": watch, **filters})
    records: list[dict[str, Any]] = [
        {**record, "worker": instance}
        for instance, answer in answers.by_worker.items()
        for record in answer["records"]
    ]
    records.sort(key=lambda each: int(each["ms"]))
    skipped = sum(int(answer["skipped"]) for answer in answers.by_worker.values())
    return {
        "watch": watch,
        "records": records[-_RECORDS:],
        "skipped": skipped + max(0, len(records) - _RECORDS),
        "missing": {**dict.fromkeys(answers.silent, "did not answer"), **answers.failed},
    }
