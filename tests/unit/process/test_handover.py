"""Listening sockets from systemd and from workers that answer late."""

from __future__ import annotations

import os
import socket

import pytest

from relay.core.errors import StartError
from relay.process import handover
from relay.process.handover import Inheritance, discard_sockets, receive_sockets, send_sockets
from relay.transports.socket.inherited import InheritedSocket


@pytest.mark.parametrize("count", ["1", "3"])
def test_a_wrong_number_of_sockets_is_a_start_error(
    monkeypatch: pytest.MonkeyPatch, count: str
) -> None:
    # No process has so many descriptors, so none of them is open.
    monkeypatch.setattr(handover, "_FIRST_SYSTEMD_SOCKET", 1 << 30)
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    monkeypatch.setenv("LISTEN_FDS", count)
    with pytest.raises(StartError, match=f"LISTEN_FDS={count}: socket 1 cannot be used"):
        Inheritance.of_environment()


async def test_sockets_of_an_earlier_attempt_are_not_used() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, socket.create_server(("127.0.0.1", 0)) as late:
        ours.setblocking(False)
        discard_sockets(ours)
        for _ in range(2):
            send_sockets(theirs, [InheritedSocket(late)])
        discard_sockets(ours)
        with socket.create_server(("127.0.0.1", 0)) as listening:
            send_sockets(theirs, [InheritedSocket(listening)])
            (found,) = await receive_sockets(ours, 1)
            with found.socket:
                assert found.socket.getsockname() == listening.getsockname()
