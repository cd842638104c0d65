"""Values of settings that are lists separated by commas, and lists of origins."""

from __future__ import annotations

from urllib.parse import urlsplit


def split(text: str) -> list[str]:
    """Split a list at its commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def check_origins(text: str) -> str:
    """Return `text`. Raise ValueError unless it is a list of origins."""
    for origin in split(text):
        parts = urlsplit(origin)
        try:
            whole = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
        except ValueError:
            whole = False
        # Reject '*': it would let any page connect with the user's cookie.
        if (
            not whole
            or "*" in origin
            or "@" in origin
            or origin != f"{parts.scheme}://{parts.netloc}"
        ):
            raise ValueError(f"{origin!r} is not an origin such as https://app.example.org")
    return text


def origins(text: str) -> frozenset[str]:
    """Return a list of origins as browsers send them: without the scheme's default port."""
    return frozenset(
        origin.removesuffix(":443" if origin.startswith("https:") else ":80")
        for origin in split(text.lower())
    )
