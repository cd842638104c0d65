from __future__ import annotations

import pytest

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
