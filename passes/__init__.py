"""The compiler: trace, find, shapes, select, rewrite, merge. Imported as ``tdfx.passes``."""
