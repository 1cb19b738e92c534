"""Models that several processes train together, in DistributedDataParallel or FSDP2."""
