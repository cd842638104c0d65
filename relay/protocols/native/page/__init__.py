"""The live page: static files that load nothing from other hosts."""

from __future__ import annotations

from relay.doorkit import static_page
from relay.doorkit.static_page import Asset

# All files except the page itself are below /live/, which no other protocol uses. The page has a
# second path there, because Centrifugo's `web` option uses / for the console.
_FILES = (
    ("/", "index.html"),
    ("/live/", "index.html"),
    ("/live/app.js", "app.js"),
    ("/live/view.js", "view.js"),
    ("/live/style.css", "style.css"),
    ("/live/icon.svg", "icon.svg"),
)


def load() -> tuple[Asset, ...]:
    """Read all files of the page, the page itself first."""
    return static_page.load(__name__, _FILES)
