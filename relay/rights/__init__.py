"""Decide who may read which channel."""
