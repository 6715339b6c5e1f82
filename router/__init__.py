"""Holds client connections, picks a backend from load snapshots, relays message bytes."""
