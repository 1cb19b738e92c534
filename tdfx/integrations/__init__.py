"""Callbacks for the trainers of others, each in a file that imports its framework; nothing else of tdfx imports them."""
