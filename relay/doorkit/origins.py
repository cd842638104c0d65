"""Which web pages may use a protocol's cookie, and which may read its responses.

A browser adds cookies to requests of any page. A cookie is therefore accepted only from pages of
relay's own host and of the origins in the protocol's `allowed_origins`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from relay.config.lists import plain_origin
from relay.core.errors import Forbidden

_log = logging.getLogger(__name__)

# A browser's Origin is a scheme, a host name of at most 253 characters and a port.
_ORIGIN_CHARS = 300
_NO_ORIGIN = {"Vary": "Origin"}


class AllowedOrigins:
    """The origins that one protocol allows: relay's own host and the configured ones.

    `headers` in all methods are those of the request, in a mapping that ignores case.
    """

    def __init__(self, origins: frozenset[str], setting: str) -> None:
        """`setting` is the name of the setting, for the log."""
        self._origins = origins
        self._setting = setting

    def allow(self, headers: Mapping[str, str]) -> bool:
        """Return True if the request has an Origin that is allowed.

        Proxies often add the port to Host, or end TLS. The origin's scheme therefore counts, and
        its default port may be missing in both headers.
        """
        origin = _plain(headers.get("Origin", ""))
        if origin is None:
            return False
        scheme = origin.partition(":")[0]
        if origin in self._origins:
            return True
        return scheme in ("http", "https") and origin == _plain(
            f"{scheme}://{headers.get('Host', '')}"
        )

    def allow_cookie(self, headers: Mapping[str, str]) -> bool:
        """Return True if the page that made this request may use the cookie.

        A browser sends no Origin with a GET to the page's own host, but Sec-Fetch-Site.
        """
        if "Origin" in headers:
            return self.allow(headers)
        return headers.get("Sec-Fetch-Site") in ("same-origin", "none")

    def check_cookie(self, headers: Mapping[str, str], instead: str = "") -> None:
        """Raise Forbidden, and log the origin, if the page may not use the cookie.

        `instead` tells clients without an Origin how to send their credential.
        """
        if self.allow_cookie(headers):
            return
        origin = headers.get("Origin")
        if origin is None:
            raise Forbidden(f"a cookie needs an Origin; {instead}" if instead else "no Origin")
        reason = f"Origin {_shown(origin)} is not allowed; add it to {self._setting}"
        _log.warning(
            "Rejected a client with a cookie: %s. If the page is relay's own, a proxy has replaced"
            " Host by %s; let it pass on the browser's Host",
            reason,
            _shown(headers.get("Host", "")),
        )
        raise Forbidden(reason)

    def cors(self, headers: Mapping[str, str], path: str) -> dict[str, str]:
        """Return the headers that let a page of an allowed origin read the response.

        Log the origin of any other page: its browser discards the response and shows the page no
        reason.
        """
        origin = headers.get("Origin")
        if origin is None:
            return dict(_NO_ORIGIN)
        if not self.allow(headers):
            _log.warning(
                "Pages of origin %s cannot read %s: add the origin to %s to allow it",
                _shown(origin),
                path,
                self._setting,
            )
            return dict(_NO_ORIGIN)
        return any_origin(headers)


def any_origin(headers: Mapping[str, str]) -> dict[str, str]:
    """Return the headers that let a page of any origin read the response.

    The origin is repeated because browsers reject "*" for requests with credentials.
    """
    origin = headers.get("Origin")
    if origin is None or not origin.isprintable():
        return dict(_NO_ORIGIN)
    return {
        "Access-Control-Allow-Origin": origin,
        "Access-Control-Allow-Credentials": "true",
        "Vary": "Origin",
    }


def _plain(origin: str) -> str | None:
    try:
        return plain_origin(origin) if len(origin) <= _ORIGIN_CHARS else None
    except ValueError:
        return None


def _shown(origin: str) -> str:
    return ascii(origin[:_ORIGIN_CHARS])
