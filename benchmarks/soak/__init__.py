"""Hours under load and faults: `python -m benchmarks.soak`."""
