"""The native protocol: server-sent events, WebSocket with JSON messages, and the live page."""
