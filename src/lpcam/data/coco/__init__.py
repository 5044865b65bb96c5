"""MS COCO annotations."""
