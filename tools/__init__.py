"""Programs for developing the package: the bundled backbone, and counts of its size."""
