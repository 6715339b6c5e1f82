"""Execution on a CUDA device: fused kernels over fixed buffers, replayed as CUDA graphs.

    inputs.py    what a sweep needs to know, packed by the host and sent in one copy
    forward.py   the launches of one sweep, over those inputs and fixed activations
    host_rows.py those of its host rows, on branches; host_side.py tells the host who comes
    graphs.py    sweeps of up to 512 rows, captured for padded sizes
    runner.py    plans -> sweeps -> results; the next sweep is queued while one runs
    queued.py    what is known of a queued sweep until its tokens reach the host
    kv.py        the GPU tier's KV pool

Everything but graphs.py also runs on a CPU in Triton's interpreter, for tests.
"""
