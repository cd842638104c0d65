"""Deliver events from Redis Streams to WebSocket and server-sent-event clients."""

__version__ = "0.1.0"
