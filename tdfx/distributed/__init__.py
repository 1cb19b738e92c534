"""Models that several processes train together."""
