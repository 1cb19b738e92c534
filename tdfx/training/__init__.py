"""What a plain training loop can add: when to switch, and what acts beside the optimizer's steps."""
