"""Images, labels, masks and map files on disk."""
