"""The node that runs a model: front end, engine core, and the session with its cpu_service."""
