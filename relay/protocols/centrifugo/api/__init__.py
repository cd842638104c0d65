"""The HTTP API: commands of application servers."""
