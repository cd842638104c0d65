"""Configuration: settings, loading from file, environment and flags, files of other servers."""
