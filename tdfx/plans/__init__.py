"""Plans: what will be done to each site of a model, and how a plan is printed, summed and logged."""
