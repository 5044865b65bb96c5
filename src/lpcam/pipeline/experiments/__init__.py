"""Experiments: several runs that are compared, described by a YAML file."""
