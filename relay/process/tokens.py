"""Read tokens: native JWTs, and tokens of the mounted protocols."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from relay.core.errors import Unauthorized
from relay.doorkit.contract import ReadsTokens
from relay.rights.token import TokenReader

if TYPE_CHECKING:
    from relay.config.settings import JwtSettings
    from relay.core.model import Principal
    from relay.doorkit.contract import Mounted


class Tokens:
    """Reads tokens. `doors` is set when the protocols are mounted."""

    def __init__(self, settings: JwtSettings) -> None:
        self.doors: Iterable[Mounted] = ()
        self.reload(settings)

    def reload(self, settings: JwtSettings) -> None:
        """Use new keys for native tokens."""
        self._native = TokenReader(settings)

    def read(self, token: str) -> Principal:
        """Return the token's principal. Unauthorized if neither kind of token is valid."""
        try:
            return self._native.read(token)
        except Unauthorized:
            for door in self.doors:
                principal = door.read_token(token) if isinstance(door, ReadsTokens) else None
                if principal is not None:
                    return principal
            raise
