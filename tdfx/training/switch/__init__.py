"""``Switch``: when to switch from dense to factorized training, and whether that pays off."""
