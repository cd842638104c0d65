"""All local clients in memory: delivery, catch-up, resume. Sans-I/O."""
