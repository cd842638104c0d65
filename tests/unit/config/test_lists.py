"""Lists of origins in the settings of protocols."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from relay.protocols.native.settings import NativeSettings
from relay.protocols.pydio.settings import PydioSettings
from relay.protocols.socketio.settings import SocketIoSettings

SECTIONS = NativeSettings, PydioSettings, SocketIoSettings
Sections = type[NativeSettings] | type[PydioSettings] | type[SocketIoSettings]


@pytest.mark.parametrize("section", SECTIONS)
def test_origins_are_normalized_like_those_of_browsers(section: Sections) -> None:
    """Origins are in lower case and without the default port."""
    given = "https://App.example.org, http://a:80,http://b:8080 , https://c:443,"
    # Apps in web views, a host with a dot at its end, and a name that browsers send in ASCII.
    given += "capacitor://localhost, ionic://localhost, https://d.:443, https://b\u00fccher.example"
    given += ", http://[0:0::1]:80"
    assert section(allowed_origins=given).origins() == {
        "https://app.example.org",
        "http://a",
        "http://b:8080",
        "https://c",
        "capacitor://localhost",
        "ionic://localhost",
        "https://d",
        "https://xn--bcher-kva.example",
        "http://[::1]",
    }
    assert section().origins() == frozenset()


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize(
    "origin",
    [
        *("*", "null", "app.example.org", "https://a/x", "file://", "https://u@a"),
        *("https://*.a", "https://a:99999", "https://", "https://.", "https://[::g]", "a b://c"),
    ],
)
def test_an_invalid_origin_is_rejected_by_name(section: Sections, origin: str) -> None:
    """An origin that never matches would be confusing, and '*' would open a security hole."""
    with pytest.raises(ValidationError, match="is not an origin such as"):
        section(allowed_origins=origin)


def test_a_trailing_slash_of_an_origin_is_ignored() -> None:
    with pytest.raises(ValidationError, match="is not an origin such as"):
        NativeSettings(allowed_origins="https://a/")
    # Accepted since the first version of this protocol.
    assert SocketIoSettings(allowed_origins="https://a/").origins() == {"https://a"}
