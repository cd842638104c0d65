"""Connections to Redis: discovery, pipelines, scripts, refused commands."""
