"""What a protocol implements and what it receives."""
