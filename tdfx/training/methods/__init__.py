"""Methods that act on a factorized model while it trains: decay, penalty, freezing, re-warm-up."""
