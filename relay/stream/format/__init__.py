"""Entries, key names and ephemeral payloads; shared with producers."""
