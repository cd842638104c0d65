from __future__ import annotations

import pytest

from relay.core.reasons import Reason
from relay.protocols.centrifugo import codec


@pytest.mark.parametrize(
    ("info", "wanted"),
    [
        (b'{"client":"c","user":"u"}', b'{"user":"u","client":"c"}'),
        (b'{"user":"u","default_info": {"a": 1},"more":2}', None),
        (b"[]", b""),
        (b'"text"', b""),
        (b"{}", b""),
        (b'{"user":7}', b""),
        (b'{"user":"u","default_info":null}', b'{"user":"u","client":""}'),
    ],
)
def test_info_has_the_format_of_v1_or_is_dropped(info: bytes, wanted: bytes | None) -> None:
    if wanted is None:
        wanted = b'{"user":"u","client":"","default_info":{"a":1}}'
    assert codec.client_info(info) == (wanted or None)


def test_every_reason_for_closing_has_v1s_text() -> None:
    """Requests and subscriptions can be rejected for the other reasons. They close nothing."""
    others = {
        Reason.BAD_REQUEST,
        Reason.FORBIDDEN,
        Reason.OVERLOADED,
        Reason.REVOKED,
        Reason.RIGHTS_CHANGED,
        Reason.UNSUBSCRIBED,
        Reason.OTHER_USER,
        Reason.NO_PONG,
    }
    assert set(codec.CLOSES) == set(Reason) - others
    assert codec.close_reason(Reason.SLOW) == '{"reason":"slow","reconnect":false}'
    assert codec.close_reason(Reason.SLOW, reconnects=True) == '{"reason":"slow","reconnect":true}'
