"""The live page: static files, read once, that load nothing from other hosts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib.resources import files
from typing import NamedTuple

# Allows only what the page needs. img-src is for the tab's icon.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# All files except the page itself are below /live/, which no other protocol uses.
_FILES = (
    ("/", "index.html", "text/html; charset=utf-8"),
    ("/live/app.js", "app.js", "text/javascript; charset=utf-8"),
    ("/live/view.js", "view.js", "text/javascript; charset=utf-8"),
    ("/live/style.css", "style.css", "text/css; charset=utf-8"),
    ("/live/icon.svg", "icon.svg", "image/svg+xml"),
)


class Asset(NamedTuple):
    """One file with its path and response headers."""

    path: str
    content_type: str
    body: bytes
    headers: Mapping[str, str]


def load() -> tuple[Asset, ...]:
    """Read all files of the page, the page itself first."""
    folder = files(__name__)
    return tuple(_asset(path, kind, (folder / name).read_bytes()) for path, name, kind in _FILES)


def _asset(path: str, content_type: str, body: bytes) -> Asset:
    headers = {
        "Content-Security-Policy": CONTENT_SECURITY_POLICY,
        # Browsers must revalidate, so that no old script is used after an upgrade of relay.
        "Cache-Control": "no-cache",
        "ETag": f'"{hashlib.sha256(body).hexdigest()[:24]}"',
        "X-Content-Type-Options": "nosniff",
        # The URL of a stream that this page opens may contain a token.
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
    }
    return Asset(path, content_type, body, headers)
