"""LPCAM: the equations of the paper, prototypes and extractors."""
