"""The segmentation networks."""
