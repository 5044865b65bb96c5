"""Refinement: from class maps to pseudo masks that follow the edges of the image."""
