"""Callbacks for the trainers of Lightning and Transformers; nothing else in tdfx imports these frameworks."""
