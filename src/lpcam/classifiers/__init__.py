"""Any classifier as a backbone and a linear head."""
