"""Carrying an optimizer along when weights turn into factors, and back."""
