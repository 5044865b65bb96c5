"""LPCAM behind the calling conventions of other libraries."""
