"""Answers for operators: connections, the journal, and why a client did not receive an event."""
