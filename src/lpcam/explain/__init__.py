"""Maps of new images, for people."""
