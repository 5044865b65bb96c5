"""Segmenters: training on pseudo masks, testing, and masks of new images."""
