"""Triton kernels of the GPU tier: one kernel a file, each with a checking host wrapper.

All are safe inside CUDA graphs: no host synchronisation, grids that depend on shapes alone, and
lengths and block tables read from device memory. With TRITON_INTERPRET=1 they run on a CPU.
"""
