"""Maps of new images."""
