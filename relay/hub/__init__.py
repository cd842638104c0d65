"""Local clients in memory: delivery, catch-up, resume. No I/O."""
