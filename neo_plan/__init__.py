"""Capacity planning with the engine's own scheduler on models of machines (`neo plan`). Needs the
extra `engine`."""
