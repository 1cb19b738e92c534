"""The wrappers of a model in training: ``torch.compile``, DistributedDataParallel, FSDP2, and a trainer that holds it."""
