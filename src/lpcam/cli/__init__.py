"""The `lpcam` command."""
