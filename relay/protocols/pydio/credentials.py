"""What a browser brings to say who it is, and whether its page may use that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from relay.core.errors import Forbidden, Unauthorized
from relay.protocols.pydio.settings import PydioSettings, split

if TYPE_CHECKING:
    from multidict import MultiMapping


@dataclass(frozen=True, slots=True)
class Credentials:
    """Pydio's cookies as the browser sent them, or the token and hash of 6.5 to 8."""

    cookies: str = field(default="", repr=False)
    token: str = field(default="", repr=False)
    hash: str = field(default="", repr=False)


class CredentialsReader:
    """Finds credentials in requests, by one set of settings."""

    def __init__(self, settings: PydioSettings) -> None:
        self._beginnings = tuple(split(settings.cookies))
        self._origins = settings.origins()

    def read(
        self,
        headers: MultiMapping[str],
        query: Mapping[str, str],
        auth: Mapping[str, Any] | None = None,
    ) -> Credentials:
        """Unauthorized where there are none, Forbidden where a foreign page has made the browser
        bring its cookies. `auth` is what a Socket.IO client may give besides the query."""
        for fields in (auth or {}, query):
            token, proof = fields.get("auth_token", ""), fields.get("auth_hash", "")
            if isinstance(token, str) and isinstance(proof, str) and token and proof:
                return Credentials(token=token, hash=proof)
        cookies = chosen_cookies("; ".join(headers.getall("Cookie", ())), self._beginnings)
        # What is not UTF-8 is none of Pydio's, and could not be sent on.
        if not cookies or not cookies.isprintable():
            raise Unauthorized("log in to Pydio first")
        if not self.is_allowed(headers):
            raise Forbidden("this Origin is not in [protocol:pydio] allowed_origins")
        return Credentials(cookies=cookies)

    def is_allowed(self, headers: MultiMapping[str]) -> bool:
        """Whether the page is the relay's own host's or of an allowed Origin."""
        origin = headers.get("Origin")
        if origin is None:
            # A page's own GET to its host has none; browsers say so in Sec-Fetch-Site.
            return headers.get("Sec-Fetch-Site") == "same-origin"
        origin, host = origin.lower(), headers.get("Host", "").lower()
        return origin in self._origins or origin in (f"http://{host}", f"https://{host}")

    def cors(self, headers: MultiMapping[str]) -> dict[str, str]:
        """For an allowed page: it may read the answer, with its cookie. For others: nothing."""
        origin = headers.get("Origin")
        if origin is None or not origin.isprintable() or not self.is_allowed(headers):
            return {"Vary": "Origin"}
        return {
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Allow-Credentials": "true",
            "Vary": "Origin",
        }


def chosen_cookies(header: str, beginnings: tuple[str, ...]) -> str:
    """Of a Cookie header the pairs whose names begin so, unchanged."""
    pairs = (pair.strip() for pair in header.split(";"))
    return "; ".join(pair for pair in pairs if "=" in pair and pair.startswith(beginnings))
