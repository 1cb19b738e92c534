"""Passes and helpers that decide: a scheme and ranks for each site, by rules or within a budget."""
