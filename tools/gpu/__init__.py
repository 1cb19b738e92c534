"""The sections of tools/bench_gpu.py."""
