"""Saving and loading a run on either side of a rewrite."""
