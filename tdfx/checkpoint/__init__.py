"""Saving a run to one file and loading it again, whether the model was rewritten or not."""
