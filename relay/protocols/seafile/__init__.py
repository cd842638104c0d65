"""The Seafile protocol, which replaces Seafile's notification server."""
