"""relay: events from Redis streams to websocket and server-sent-event clients, losslessly."""

__version__ = "0.1.0"
