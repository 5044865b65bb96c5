"""The stages of a run, a module each, and what they share."""
