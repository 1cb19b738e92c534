"""Passes that change a model: put factors in place of weights, and join them again."""
