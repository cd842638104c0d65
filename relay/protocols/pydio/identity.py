"""Who a browser's credential stands for, as Pydio's `ws_authenticate` tells it; no I/O.

The answer is the user's part of Pydio's registry (class.AJXP_XMLWriter.php, `getUserXML`, 6.4.2;
8.2.5 the same): user, group path, and the workspaces with their rights.
"""

from __future__ import annotations

# Pydio's own answer, of limited size; expat (2.4 and later) bounds what entities may grow to.
import xml.etree.ElementTree as ET
from dataclasses import dataclass

from relay.core.errors import Unauthorized
from relay.protocols.pydio.private_messages import workspace


class InvalidResponse(ValueError):
    """The answer is none: Pydio is broken or something else answered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """A user and the IDs of the workspaces that may be read; those in `masked` only in part."""

    user: str
    group_path: str = ""
    readable: frozenset[str] = frozenset()
    masked: frozenset[str] = frozenset()


def read(answer: bytes) -> Identity:
    """From the XML. Unauthorized where Pydio knows nobody by this credential."""
    try:
        root = ET.fromstring(answer)  # noqa: S314 - see the import
    except (ET.ParseError, ValueError, LookupError):
        raise InvalidResponse("response is not valid XML") from None
    error = root.find(".//message[@type='ERROR']")
    if error is not None:
        raise Unauthorized(f"Pydio says: {' '.join(''.join(error.itertext()).split())[:200]}")
    user = root if root.tag == "user" else root.find("user")
    name = "" if user is None else user.get("id", "")
    if user is None or not name:
        raise Unauthorized("Pydio names no user")
    readable, masked = set(), set()
    for repository in user.iterfind("repositories/repo"):
        key = repository.get("id", "")
        if key and _may_read(repository.get("acl", "")) and _can_be_followed(key):
            readable.add(key)
            if repository.get("hasMask") == "true":
                masked.add(key)
    return Identity(
        user=name,
        group_path=user.get("groupPath", ""),
        readable=frozenset(readable),
        masked=frozenset(masked),
    )


def _may_read(acl: str) -> bool:
    # As Pydio Booster; an empty one is that of an installation without users.
    return not acl or "r" in acl


def _can_be_followed(key: str) -> bool:
    try:
        workspace(key)
    except ValueError:
        return False
    return True
