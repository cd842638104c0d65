"""Connections to Redis: discovery, pipelines, scripts, rejected commands."""
