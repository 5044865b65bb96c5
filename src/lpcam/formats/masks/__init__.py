"""Mask formats of labelling tools and training programs."""
