"""The native door: server-sent events, a plain JSON websocket, and the live page."""
