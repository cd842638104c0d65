"""Messages to systemd, if it has started relay with `Type=notify` (sd_notify(3))."""

from __future__ import annotations

import contextlib
import os
import socket


def notify(**values: object) -> None:
    """Send values such as READY=1. Do nothing without systemd."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = f"\0{address[1:]}"
    message = "\n".join(f"{name}={value}" for name, value in values.items())
    # Ignore errors: relay works without these messages.
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock,
    ):
        sock.setblocking(False)
        sock.sendto(message.encode(), address)
