"""Seafile's side of the wire, by hand: tokens as its servers sign them, and a client's socket."""

from __future__ import annotations

import base64
import hmac
import json
import time
from typing import Any

KEY = "M@O8VWUb81YvmtWLHGB2I_V7di5-@0p(MF*GrE!sIws23F"


def sign(key: str = KEY, algorithm: str = "HS256", **claims: Any) -> str:
    """A JWT with exactly these claims, under a key of any length."""
    head = _base64(json.dumps({"alg": algorithm, "typ": "JWT"}).encode())
    signed = f"{head}.{_base64(json.dumps(claims).encode())}"
    if algorithm == "none":
        return f"{signed}."
    digest = hmac.digest(key.encode(), signed.encode(), f"sha{algorithm[2:]}")
    return f"{signed}.{_base64(digest)}"


def subscribe_token(
    repo_id: str, user: str = "alice@example.com", *, ttl_s: float = 259_200, key: str = KEY
) -> str:
    """What a client gets for one library: valid for 72 hours."""
    return sign(key, repo_id=repo_id, username=user, exp=int(time.time() + ttl_s))


def sender_token(ttl_s: float = 300, key: str = KEY) -> str:
    """What seaf-server signs for each event."""
    return sign(key, exp=int(time.time() + ttl_s))


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")
