"""Carries optimizers, gradients, averages and masters along when weights become factors, and back."""
