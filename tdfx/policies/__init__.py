"""Policies: the user's wish in Python and in TOML or JSON files."""
