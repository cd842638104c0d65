"""The internal address of this worker, at which workers of other hosts pass on requests to it."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from relay.core.errors import RelayError, StartError
from relay.process.addresses import bound

if TYPE_CHECKING:
    from relay.config.settings import NodeSettings
    from relay.stream.shards.shard import ShardMap
    from relay.transports.between_workers.internal import InternalListener
    from relay.transports.socket.inherited import InheritedSockets

_log = logging.getLogger(__name__)


def check_internal(node: NodeSettings) -> None:
    """Raise StartError if this host does not have the configured address.

    Its port may be in use, by the relay that runs with this configuration.
    """
    configured = urlsplit(f"//{node.internal_address}")
    if not configured.hostname:
        return
    try:
        for sock in bound(configured.hostname, 0):
            sock.close()
    except OSError as exc:
        port = configured.port or 0
        problem = f"cannot listen on {configured.hostname} port {port}: {exc.strerror or exc}"
        raise StartError(f"[node] internal_address: {problem}") from exc


async def open_internal(
    listener: InternalListener,
    node: NodeSettings,
    shards: ShardMap,
    number: int | None,
    inherited: InheritedSockets,
) -> str:
    """Open the internal listener and return its address, or '' if none is needed.

    `number` is the number of this worker if there are several. Raise StartError if the configured
    address cannot be used.
    """
    check_internal(node)
    configured = urlsplit(f"//{node.internal_address}")
    host = configured.hostname or await _local_address(shards)
    if host is None:
        return ""
    port = configured.port + (number or 1) - 1 if configured.port else 0
    try:
        taken = inherited.take("internal", [host], port)[0] if port else []
        port = await listener.start(host, port, taken[0].socket if taken else None)
    except OSError as exc:
        problem = f"cannot listen on {host} port {port}: {exc.strerror or exc}"
        if node.internal_address:
            raise StartError(f"[node] internal_address: {problem}") from exc
        _log.warning(
            "Workers of other hosts cannot pass on requests to this one: %s;"
            " set [node] internal_address",
            problem,
        )
        return ""
    _log.info("Accepting requests of other workers at %s port %d", host, port)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def _local_address(shards: ShardMap) -> str | None:
    """Return the local address of connections to Redis, or None if Redis runs on this host."""
    try:
        await shards.refresh()
        endpoint = await shards.home.locate()
        if endpoint.path or not endpoint.host:
            return None
        loop = asyncio.get_running_loop()
        kind = socket.SOCK_DGRAM
        family, _, _, _, address = (
            await loop.getaddrinfo(endpoint.host, endpoint.port, type=kind)
        )[0]
        with socket.socket(family, kind) as probe:
            # Choose the route. For UDP, nothing is sent.
            probe.connect(address)
            found: str = probe.getsockname()[0]
    except (OSError, RelayError) as exc:
        _log.warning("Could not determine the internal address: %s", exc)
        return None
    return None if ipaddress.ip_address(found.partition("%")[0]).is_loopback else found
