"""Plain HTTP as v1's handlers speak it: Go's forms and Go's error pages."""

from __future__ import annotations

from urllib.parse import parse_qs

from aiohttp import web


class TooLarge(Exception):
    """More bytes than a request may have."""


async def body(request: web.Request, limit_bytes: int) -> bytes:
    """All of it; TooLarge as soon as that is known."""
    if (request.content_length or 0) > limit_bytes:
        raise TooLarge
    parts: list[bytes] = []
    size = 0
    while part := await request.content.readany():
        parts.append(part)
        size += len(part)
        if size > limit_bytes:
            raise TooLarge
    return b"".join(parts)


async def form(request: web.Request, limit_bytes: int) -> dict[str, bytes]:
    """The fields of a form of any kind; Go's FormValue takes the body before the query. ValueError
    where it cannot be read, TooLarge as above."""
    fields = {name: value.encode() for name, value in reversed(list(request.query.items()))}
    kind = request.headers.get("Content-Type", "").lower()
    if kind.startswith("multipart/form-data"):
        posted = await request.post()
        fields |= {name: value.encode() for name, value in posted.items() if isinstance(value, str)}
    elif kind.startswith("application/x-www-form-urlencoded"):
        text = (await body(request, limit_bytes)).decode()
        # As Latin-1 every byte is kept, whatever the text's encoding.
        found = parse_qs(text, encoding="latin-1", max_num_fields=100)
        fields |= {name: values[0].encode("latin-1") for name, values in found.items()}
    return fields


def error(status: int, text: str) -> web.Response:
    """Go's http.Error."""
    return web.Response(
        status=status,
        text=f"{text}\n",
        content_type="text/plain",
        charset="utf-8",
        headers={"X-Content-Type-Options": "nosniff"},
    )
