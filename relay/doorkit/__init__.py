"""The contract of a protocol, and code that several protocols need."""
