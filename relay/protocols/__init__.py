"""The front doors: one folder a protocol; none knows another."""
