"""Producers: what puts events into workspaces' streams, in the relay's process or alone."""
