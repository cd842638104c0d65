"""Who may read which workspace."""
