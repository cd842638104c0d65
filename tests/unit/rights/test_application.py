"""Requests to an application: whom a failure concerns, and what the log says."""

from __future__ import annotations

import logging

import pytest

from relay.rights.application import ApplicationRequests, InvalidResponse


def requests() -> ApplicationRequests:
    return ApplicationRequests(
        "Pydio authentication request", concurrent=1, queue_timeouts=1, consequence="nothing works"
    )


async def test_an_unusable_answer_concerns_its_user_only(caplog: pytest.LogCaptureFixture) -> None:
    """Between good answers about others: the application itself works all the time."""
    application = requests()
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            with pytest.raises(InvalidResponse):
                async with application.request(1.0, "bob"):
                    raise InvalidResponse("response is not valid XML")
            async with application.request(1.0, "alice"):
                pass
    assert set(caplog.messages) == {
        (
            "Pydio authentication request about bob failed: response is not valid XML; access is"
            " denied or not updated for this user"
        )
    }


async def test_an_application_that_is_away_is_logged_once_and_so_is_its_return(
    caplog: pytest.LogCaptureFixture,
) -> None:
    application = requests()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            with pytest.raises(InvalidResponse):
                async with application.request(1.0, "bob"):
                    raise ConnectionResetError
        async with application.request(1.0, "bob"):
            pass
    assert caplog.messages == [
        "Pydio authentication request failed: ConnectionResetError; nothing works",
        "Pydio authentication request succeeded again",
    ]
