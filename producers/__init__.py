"""Programs that publish events from other sources, in a relay process or in their own process."""
