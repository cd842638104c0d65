"""SockJS: sessions, transports and routes."""
