"""A hand-written Engine.IO 4 client over WebSocket with one Socket.IO namespace."""

from __future__ import annotations

import json
from typing import Any

from tests.support.contract import Frames


class EngineIo(Frames):
    """One connection. Its URL needs `EIO=4&transport=websocket`.

    Clients that support recovery also send a recent `t`.
    """

    QUERY = "EIO=4&transport=websocket&t=abcd1234"

    namespace = ""
    pid = ""
    offset = ""

    async def start(self, namespace: str, auth: dict[str, str]) -> None:
        """Connect to the namespace. The reply is the next packet."""
        self.namespace = "" if namespace == "/" else f"{namespace},"
        opened = await self.next()
        assert opened.startswith("0{"), opened
        await self.socket.send_str(f"40{self.namespace}{json.dumps(auth)}")

    async def packet(self) -> tuple[str, Any]:
        """Return type and value of the next packet, or ("close", words) at the end.

        Types: `0` CONNECT, `1` DISCONNECT, `2` EVENT, `3` ACK, `4` CONNECT_ERROR.
        """
        while (text := await self.next()) == "2":
            await self.socket.send_str("3")
        if text.startswith("close"):
            return "close", text
        assert text[0] == "4", text
        kind, rest = text[1], text[2:].removeprefix(self.namespace)
        rest = rest.lstrip("0123456789") if kind == "3" else rest
        value: Any = json.loads(rest) if rest else None
        if kind == "0":
            self.pid = value.get("pid", "")
        elif kind == "2" and isinstance(value[-1], str) and value[-1].startswith("c1."):
            self.offset = value.pop()
        return kind, value

    async def notice(self, kind: str, value: Any) -> str:
        """Return the text for a packet that is not an event."""
        if kind == "close":
            return str(value)
        if kind == "4":
            code = value.get("data", {}).get("code", "")
            return f"CONNECT_ERROR {code}".rstrip()
        return {"0": "CONNECT", "1": "DISCONNECT"}[kind]

    def position(self) -> tuple[str, str]:
        """Return `pid` and offset."""
        return self.pid, self.offset
