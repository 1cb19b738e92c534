"""The ``tdfx demo`` command: one training on handwritten digits, dense and factorized."""
