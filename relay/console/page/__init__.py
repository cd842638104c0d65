"""The console's page: static files without a build step, which load nothing from other hosts."""

from __future__ import annotations

from relay.doorkit import static_page
from relay.doorkit.static_page import CONTENT_SECURITY_POLICY, Asset

# Scripts insert text into the page as text only, and the browser enforces it.
_POLICY = f"{CONTENT_SECURITY_POLICY}; require-trusted-types-for 'script'; trusted-types 'none'"
_FILES = (
    "index.html",
    "style.css",
    "icon.svg",
    "app.js",
    "api.js",
    "dom.js",
    "chart.js",
    "overview.js",
    "channels.js",
    "channel.js",
    "clients.js",
    "dead_letters.js",
    "explain.js",
    "tap.js",
)


def load(base: str) -> tuple[Asset, ...]:
    """Read all files of the page for the paths below `base`. Their links are relative."""
    paths = (("/" if name == "index.html" else f"/{name}", name) for name in _FILES)
    return static_page.load(
        __name__, ((f"{base}{path}", name) for path, name in paths), policy=_POLICY
    )
