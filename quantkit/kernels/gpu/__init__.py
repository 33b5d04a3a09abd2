"""Triton kernels, one room per kind: `matmul`, `attention` and `kv`; `common` holds what they share.

May import `kernels.layouts`, `kernels.autotune` and `common`. The rooms do not import each other, and none imports
`kernels.cpu` or `kernels.reference`.
"""
