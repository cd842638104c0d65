"""Client connections over WebSocket and SockJS."""
