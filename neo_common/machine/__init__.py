"""What the kernel grants this process: looked at, kept in a file, published as an RPC and as
metrics."""
