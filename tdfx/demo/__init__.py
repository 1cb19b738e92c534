"""The ``tdfx demo`` command: one training of handwritten digits, dense and factorized."""
