"""The operator console: a page and an admin API, protected by a password."""
