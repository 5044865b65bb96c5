"""Benchmarks: tables of ratios, each measured in one run with its peers."""
