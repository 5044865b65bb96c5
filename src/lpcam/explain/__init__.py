"""What a classifier sees in new images: maps, overlays, masks and findings."""
