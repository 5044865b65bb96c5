"""Scores of maps and masks."""
