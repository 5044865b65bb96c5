"""Networks trained on pseudo masks."""
