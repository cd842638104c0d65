"""The door of Seafile's clients and servers, in place of its notification server."""
