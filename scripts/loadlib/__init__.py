"""The benchmarks behind `scripts/load`, of relay and the servers it is compared with."""
