"""Values, errors, metrics and the interface between hub and streams."""
