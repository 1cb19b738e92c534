"""Callbacks for the trainers of other frameworks.

``lightning`` and ``transformers`` hold a ``SwitchCallback`` each and import their framework; nothing else in tdfx imports
them. ``adapter`` holds what both share, ``follow`` gives a module the form of a checkpoint that is loaded into it.
"""
