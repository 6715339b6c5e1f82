"""Which backends there are: from a list, from DNS, from Kubernetes; the last two while running."""
