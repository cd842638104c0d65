"""Everything that appends: entries, commands, dead letters, revocations."""
