"""Benchmarks: an engine in, latency and memory with the machine they were measured on out."""
