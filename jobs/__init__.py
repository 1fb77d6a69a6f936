"""Recipes and the command line."""
