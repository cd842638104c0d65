"""What `scripts/load` runs: the relay and its peers, measured on loopback."""
