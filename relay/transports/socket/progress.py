"""Whether a peer is receiving: how much of what was written its host has acknowledged.

A peer that takes its data over a slow link cannot respond in time, because a ping waits behind
that data. All timeouts for peers that are being written to therefore ask here before they close a
connection.
"""

from __future__ import annotations

import fcntl
import socket
import struct
import termios
from array import array
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio

# The kernel's `struct tcp_info`: its size up to tcpi_bytes_acked (Linux 4.1), and the fields
# tcpi_last_ack_recv and tcpi_bytes_acked.
_TCP_INFO_BYTES, _FIELDS = 128, struct.Struct("@56xI60xQ")


def unacknowledged_bytes(transport: asyncio.Transport | None) -> int:
    """Return the number of written bytes that the peer's host has not acknowledged.

    They are in the buffer of the transport or in that of the kernel.
    """
    if transport is None or (connection := transport.get_extra_info("socket")) is None:
        return 0
    count = array("i", [0])
    try:
        fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, count)
    except (OSError, ValueError):
        return 0
    return transport.get_write_buffer_size() + count[0]


def acknowledged_bytes(transport: asyncio.Transport | None) -> int:
    """Return the number of bytes that the peer's host has acknowledged. 0 means unknown."""
    return _tcp_info(transport)[1]


def is_receiving(transport: asyncio.Transport | None, known: int, within_s: float) -> bool:
    """Return whether the peer's host has acknowledged more than `known` bytes, the last recently.

    That is the case if some are still on their way, or the last arrived less than `within_s` ago.
    """
    last_ms, acknowledged = _tcp_info(transport)
    if acknowledged <= known:
        return False
    return unacknowledged_bytes(transport) > 0 or last_ms < within_s * 1000


def _tcp_info(transport: asyncio.Transport | None) -> tuple[int, int]:
    connection = None if transport is None else transport.get_extra_info("socket")
    if connection is None:
        return 0, 0
    try:
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
        last_ms, acknowledged = _FIELDS.unpack(info)
    except (OSError, ValueError, struct.error):
        return 0, 0
    return last_ms, acknowledged
