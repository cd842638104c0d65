"""Pydio's door: PHP on the private channel, its browsers on the public one."""
