"""State that all workers share: heartbeats, presence, bus, store, limits."""
