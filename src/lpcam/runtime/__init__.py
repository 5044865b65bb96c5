"""Files, errors and the machine."""
