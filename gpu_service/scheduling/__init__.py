"""Who runs what in the next iteration, and on which tier. Pure Python over snapshots: no torch, no
GPU, no clock of its own."""
