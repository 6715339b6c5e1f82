"""Policies of the router against each other, without sockets: `python -m benchmarks.router_sim`."""
