"""What may stand around a model in training: ``torch.compile``, DistributedDataParallel, FSDP2, a trainer."""
