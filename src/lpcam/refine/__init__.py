"""Refinements of maps to pseudo masks."""
