"""`relay doctor`: finds faults of Redis, host, data, configuration and proxies."""
