"""Values of settings that are lists separated by commas, and lists of origins."""

from __future__ import annotations

import re
from ipaddress import IPv6Address

_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://(\[[0-9a-f:.]+\]|[a-z0-9._~-]+)(?::([0-9]{1,5}))?")
_DEFAULT_PORTS = {"http": 80, "https": 443}
# Browsers send `Origin: null` for pages with these schemes.
_WITHOUT_ORIGIN = frozenset({"about", "blob", "data", "file", "javascript"})


def split(text: str) -> list[str]:
    """Split a list at its commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def plain_origin(text: str) -> str:
    """Return an origin in the form in which relay compares it. Raise ValueError if it is none.

    As in browsers, case does not matter, and a scheme's default port is the same as no port. A dot
    at the end of the host does not matter either: some proxies remove it. Web views have schemes of
    their own, such as `capacitor://localhost`.
    """
    found = _ORIGIN.fullmatch(text.lower())
    if found is None:
        raise ValueError("not an origin")
    scheme, host, digits = found.groups()
    port = int(digits) if digits else None
    if port == 0 or (port or 0) > 65535 or scheme in _WITHOUT_ORIGIN:
        raise ValueError("not an origin")
    if host.startswith("["):
        host = f"[{IPv6Address(host[1:-1]).compressed}]"
    host = host.removesuffix(".")
    if not host:
        raise ValueError("not an origin")
    return f"{scheme}://{host}" + ("" if port in (None, _DEFAULT_PORTS.get(scheme)) else f":{port}")


def check_origins(text: str) -> str:
    """Return `text`. Raise ValueError unless it is a list of origins."""
    origins(text)
    return text


def origins(text: str) -> frozenset[str]:
    """Return a list of origins in the form in which relay compares them."""
    return frozenset(map(_configured, split(text)))


def _configured(origin: str) -> str:
    scheme, mark, rest = origin.partition("://")
    try:
        # Browsers send the name of a host in ASCII.
        if not rest.isascii():
            host, colon, port = rest.partition(":")
            rest = host.encode("idna").decode() + colon + port
        # '*' is no origin: it would let any page connect with the user's cookie.
        return plain_origin(scheme + mark + rest)
    except ValueError:
        raise ValueError(f"{origin!r} is not an origin such as https://app.example.org") from None
