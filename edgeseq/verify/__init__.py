"""Comparing every stage with the one before."""
