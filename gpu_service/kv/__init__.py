"""Who holds which KV block: allocators per tier and block tables per choice. Pure bookkeeping, no
tensors."""
