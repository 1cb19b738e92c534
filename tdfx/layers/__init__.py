"""The modules that hold factors, structural copies of modules, and sharded tensors."""
