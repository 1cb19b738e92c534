"""Saving a run to one file and loading it again, whether the model was rewritten or not."""

from tdfx.checkpoint.former_modules import register_former_modules

register_former_modules()
