"""Spectra and the rules that read a rank from them: tensors only, no modules."""
