"""Compute kernels.

`reference` computes in plain torch what every kernel computes, and is what the tests compare them with. `layouts` defines the
memory layouts, `gpu` holds Triton kernels and `cpu` C kernels; `autotune` picks configurations of Triton kernels.
`attention_mass` is plain torch for every device.

Kernels import torch, triton and `utils` only. `layouts` imports neither `gpu` nor `cpu`; these two do not import each other;
`reference` imports `layouts` only.
"""
