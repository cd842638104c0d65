"""Files of the live page."""

from __future__ import annotations

import re

from relay.protocols.native import page


def test_everything_it_loads_is_its_own() -> None:
    """The page works offline: all files that it names are served, and none is on another host."""
    assets = {asset.path: asset for asset in page.load()}
    served = set(assets)
    for asset in assets.values():
        text = asset.body.decode()
        # An XML namespace is a name, not a URL to load.
        assert "://" not in text.replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"\sstyle=|<style|\son\w+=|@import|url\(", text)
        named = re.findall(r'(?:href|src)="([^"]+)"', text)
        named += [f"/live/{name}" for name in re.findall(r'from "\./([^"]+)"', text)]
        assert set(named) <= served


def test_the_page_comes_first_and_all_are_guarded() -> None:
    """Each file has a policy without inline scripts and styles, and an ETag of its content."""
    assets = page.load()
    assert assets[0].path == "/"
    # The page has two paths.
    assert len({asset.headers["ETag"] for asset in assets}) == len(assets) - 1
    for asset in assets:
        policy = asset.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
        assert "unsafe" not in policy
        assert asset.headers["X-Content-Type-Options"] == "nosniff"
        assert asset.path == "/" or asset.path.startswith("/live/")
