"""Credentials in a browser's request, and the check of the page's Origin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from relay.config.lists import split
from relay.core.errors import Unauthorized
from relay.doorkit.origins import AllowedOrigins
from relay.protocols.pydio.settings import PydioSettings

if TYPE_CHECKING:
    from multidict import MultiMapping


@dataclass(frozen=True, slots=True)
class Credentials:
    """Pydio's cookies as the browser sent them, or the token and hash of Pydio 6.5 to 8."""

    cookies: str = field(default="", repr=False)
    token: str = field(default="", repr=False)
    hash: str = field(default="", repr=False)


class CredentialsReader:
    """Reads credentials from requests, with one set of settings."""

    def __init__(self, settings: PydioSettings) -> None:
        self._prefixes = tuple(split(settings.cookies))
        self.origins = AllowedOrigins(settings.origins(), "[protocol:pydio] allowed_origins")

    def read(
        self,
        headers: MultiMapping[str],
        query: Mapping[str, str],
        auth: Mapping[str, Any] | None = None,
    ) -> Credentials:
        """Return the credentials of a request.

        `auth` is the auth object of a Socket.IO client, which may contain the token too.

        Raises:
            Unauthorized: The request has no credentials.
            Forbidden: The browser sent its cookies for a page of an Origin that is not allowed.
        """
        for fields in (auth or {}, query):
            token, proof = fields.get("auth_token", ""), fields.get("auth_hash", "")
            if isinstance(token, str) and isinstance(proof, str) and token and proof:
                return Credentials(token=token, hash=proof)
        cookies = chosen_cookies("; ".join(headers.getall("Cookie", ())), self._prefixes)
        # Cookies that are not UTF-8 are not Pydio's, and could not be forwarded.
        if not cookies or not cookies.isprintable():
            raise Unauthorized("log in to Pydio first")
        self.origins.check_cookie(headers)
        return Credentials(cookies=cookies)


def chosen_cookies(header: str, prefixes: tuple[str, ...]) -> str:
    """Return the pairs of a Cookie header whose names have one of these prefixes, unchanged."""
    pairs = (pair.strip() for pair in header.split(";"))
    return "; ".join(pair for pair in pairs if "=" in pair and pair.startswith(prefixes))
