"""The sender of an event, as the log names it."""

from __future__ import annotations

import pytest
from aiohttp.test_utils import make_mocked_request

from relay.protocols.seafile import answers


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"X-Forwarded-For": "192.0.2.1, 10.0.0.1"}, "192.0.2.1, 10.0.0.1"),
        ({"X-Forwarded-For": "9" * 8000}, "9" * 100),
        # The mocked request has no peer, as one whose client has disconnected.
        ({}, "a client that has disconnected"),
        ({"X-Forwarded-For": ""}, "a client that has disconnected"),
    ],
)
def test_the_sender_is_named_in_a_few_characters(headers: dict[str, str], expected: str) -> None:
    request = make_mocked_request("POST", "/events", headers=headers)
    request = request.clone(remote=None)  # type: ignore[arg-type]
    assert answers.sender(request) == expected
