"""What operators ask of running workers: connections, journal, and why a client got no event."""
