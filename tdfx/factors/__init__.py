"""Splitting a weight into factors and joining them again: tensors only, no modules."""
