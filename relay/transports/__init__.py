"""Bytes to and from one client; no protocol words."""
