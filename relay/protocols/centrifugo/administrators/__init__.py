"""The admin web interface and its socket, node statistics."""
