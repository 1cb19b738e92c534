"""The ``tdfx demo`` command: one training on handwritten digits, dense and factorized."""

DEFAULT_EPOCHS = 24
"""Epochs of each run, unless others are asked for."""
