"""From maps to pseudo masks."""
