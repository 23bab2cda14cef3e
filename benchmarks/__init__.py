"""Benchmarks against torchvision: paired runs in one process, on real or generated images."""
