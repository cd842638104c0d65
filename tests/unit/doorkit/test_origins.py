"""Which pages may use the cookie of a protocol, and read its responses."""

from __future__ import annotations

import logging
import re

import pytest
from multidict import CIMultiDict

from relay.config.lists import origins
from relay.core.errors import Forbidden
from relay.doorkit.origins import AllowedOrigins, any_origin

APP = "https://app.example.org"
ORIGINS = AllowedOrigins(origins(f"{APP}, http://other.example.org:80, capacitor://app"), "[x] y")


def headers(**values: str) -> CIMultiDict[str]:
    return CIMultiDict({name.replace("_", "-"): value for name, value in values.items()})


@pytest.mark.parametrize(
    ("sent", "allowed"),
    [
        (headers(Origin=APP), True),
        (headers(origin="HTTPS://App.example.org"), True),
        (headers(Origin="http://other.example.org"), True),
        (headers(Origin="http://relay:8000", Host="relay:8000"), True),
        (headers(Origin="https://relay", Host="RELAY"), True),
        # Load balancers add the port to Host. Proxies remove the dot at the end of a name.
        (headers(Origin="https://relay", Host="relay:443"), True),
        (headers(Origin="https://relay:443", Host="relay"), True),
        (headers(Origin="http://relay", Host="Relay.:80"), True),
        (headers(Origin="https://relay.", Host="relay"), True),
        (headers(Origin="https://[::1]", Host="[::1]:443"), True),
        (headers(Origin="https://relay", Host="relay:80"), False),
        (headers(Origin="http://relay", Host="relay:443"), False),
        (headers(Origin="capacitor://localhost", Host="localhost"), False),
        (headers(Origin="capacitor://app", Host="relay"), True),
        (headers(Origin="https://", Host=""), False),
        (headers(Origin="http://relay:8001", Host="relay:8000"), False),
        (headers(Origin=f"{APP}.evil.example"), False),
        (headers(Origin="null", Sec_Fetch_Site="same-origin"), False),
        (headers(Sec_Fetch_Site="same-origin"), True),
        (headers(Sec_Fetch_Site="none"), True),
        (headers(Sec_Fetch_Site="same-site"), False),
        (headers(), False),
    ],
)
def test_a_cookie_is_accepted_from_allowed_pages_only(
    sent: CIMultiDict[str], allowed: bool
) -> None:
    assert ORIGINS.allow_cookie(sent) is allowed


def test_a_rejected_cookie_is_logged_with_its_origin(caplog: pytest.LogCaptureFixture) -> None:
    ORIGINS.check_cookie(headers(Origin=APP))
    reason = "Origin 'https://evil.example' is not allowed; add it to [x] y"
    with caplog.at_level(logging.WARNING), pytest.raises(Forbidden, match=re.escape(reason)):
        ORIGINS.check_cookie(headers(Origin="https://evil.example", Host="backend:8000"))
    (line,) = caplog.messages
    assert line == (
        f"Rejected a client with a cookie: {reason}. If the page is relay's own, a proxy has"
        " replaced Host by 'backend:8000'; let it pass on the browser's Host"
    )


def test_a_page_of_another_origin_cannot_read_and_the_log_names_the_setting(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        assert ORIGINS.cors(headers(Origin="http://évil"), "/sse") == {"Vary": "Origin"}
    assert caplog.messages == [
        r"Pages of origin 'http://\xe9vil' cannot read /sse: add the origin to [x] y to allow it"
    ]


@pytest.mark.parametrize("cors", [any_origin, lambda sent: ORIGINS.cors(sent, "/sse")])
def test_an_allowed_page_may_read_with_its_cookie(cors: object) -> None:
    assert callable(cors)
    assert cors(headers(Origin=APP)) == {
        "Access-Control-Allow-Origin": APP,
        "Access-Control-Allow-Credentials": "true",
        "Vary": "Origin",
    }
    assert cors(headers()) == {"Vary": "Origin"}


def test_no_header_is_made_of_control_characters() -> None:
    assert any_origin(headers(Origin="http://a\x00b")) == {"Vary": "Origin"}
