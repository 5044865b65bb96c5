"""The other hosts of LPCAM: each takes maps, or its own features, and gives better maps."""
