"""Recipes, and the stages that run them."""
