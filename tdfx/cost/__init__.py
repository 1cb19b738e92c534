"""What a site costs, dense and factorized: operations and shapes only, no modules."""
