"""The command line: arguments, the lines to copy at start, exit codes."""
