"""Segmentation networks, each with its own shapes, initialisation and parameter names."""
