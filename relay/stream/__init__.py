"""The Redis side: reading, writing and maintaining streams. Only this package imports redis."""
