"""Shared memory between services of one machine: sealed memory files, and how their descriptors
change hands."""
