"""Triton kernels of both operators, for GPUs of compute capability 8.0 and newer.

Their host functions take and return what those of the cpu backend do (ifnd_fast/ops/cpu.py).
"""
