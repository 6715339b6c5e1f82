"""More than a server can do: `python -m benchmarks.overload`."""
