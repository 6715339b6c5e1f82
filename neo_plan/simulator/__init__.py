"""The engine's own loop and scheduler on a model of a machine: no GPU, no weights, no waiting."""
