"""[protocol:native]: what counts as an origin."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from relay.protocols.native.settings import NativeSettings


def test_origins_are_as_browsers_write_them() -> None:
    """Lower case, without the scheme's own port."""
    given = "https://App.example.org, http://a:80,http://b:8080 , https://c:443,"
    assert NativeSettings(allowed_origins=given).origins() == {
        "https://app.example.org",
        "http://a",
        "http://b:8080",
        "https://c",
    }
    assert NativeSettings().origins() == frozenset()


@pytest.mark.parametrize(
    "origin",
    [
        *("*", "null", "app.example.org", "https://a/", "https://a/x", "ftp://a", "https://u@a"),
        *("https://*.a", "https://a:99999", "https://"),
    ],
)
def test_what_is_no_origin_is_refused_by_name(origin: str) -> None:
    """One that never matches would be a riddle, and '*' a hole."""
    with pytest.raises(ValidationError, match="is not an origin such as"):
        NativeSettings(allowed_origins=origin)
