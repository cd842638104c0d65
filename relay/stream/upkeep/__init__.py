"""Retention, removal of unused streams and dead workers, listings for operators."""
