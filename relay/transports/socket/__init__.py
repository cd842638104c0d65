"""Bytes to and from one client: HTTP, WebSocket, SSE, heartbeats, deadlines."""
