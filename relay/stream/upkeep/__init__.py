"""Retention, removal of what is unused, listings for operators."""
