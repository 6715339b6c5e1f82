"""The engine's own scheduler and loop against a model of a machine: no GPU, no weights, no waiting."""
