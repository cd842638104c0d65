"""Parser for the response of Pydio's `ws_authenticate`: the user and the readable workspaces.

The response is the user's part of Pydio's registry (class.AJXP_XMLWriter.php, `getUserXML`, in
6.4.2 and 8.2.5): user, group path, and the workspaces with their rights.
"""

from __future__ import annotations

# The response comes from Pydio and its size is limited. expat (2.4 and later) limits the expansion
# of entities.
import xml.etree.ElementTree as ET
from dataclasses import dataclass

from relay.core.errors import Unauthorized
from relay.protocols.pydio.private_messages import workspace
from relay.rights.application import InvalidResponse


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """A user and the IDs of the workspaces that the user may read.

    Of those in `masked`, the user may see only some paths.
    """

    user: str
    group_path: str = ""
    readable: frozenset[str] = frozenset()
    masked: frozenset[str] = frozenset()


def read(answer: bytes) -> Identity:
    """Parse the XML.

    Raises:
        Unauthorized: Pydio does not accept the credentials.
        InvalidResponse: It is not XML.
    """
    try:
        root = ET.fromstring(answer)  # noqa: S314 - see the import
    except (ET.ParseError, ValueError, LookupError):
        raise InvalidResponse("response is not valid XML") from None
    error = root.find(".//message[@type='ERROR']")
    if error is not None:
        raise Unauthorized(
            f"rejected by Pydio: {' '.join(''.join(error.itertext()).split())[:200]}"
        )
    user = root if root.tag == "user" else root.find("user")
    name = "" if user is None else user.get("id", "")
    if user is None or not name:
        raise Unauthorized("no user is logged in to Pydio")
    readable, masked = set(), set()
    for repository in user.iterfind("repositories/repo"):
        key = repository.get("id", "")
        if key and _may_read(repository.get("acl", "")) and _is_channel_name(key):
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
    # The same rule as in Pydio Booster. An installation without users has an empty ACL.
    return not acl or "r" in acl


def _is_channel_name(key: str) -> bool:
    try:
        workspace(key)
    except ValueError:
        return False
    return True
