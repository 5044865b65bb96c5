"""One resumable training loop, shared by all networks."""
