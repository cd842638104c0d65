"""The operator console: a page and an admin API for whoever knows its password."""
