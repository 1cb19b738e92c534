"""Passes and helpers that look at a model: trace it, find its sites, observe what flows into them."""
