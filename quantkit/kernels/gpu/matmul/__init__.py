"""Products with quantized weights (W4A16 and W4A8), dequantization and Hadamard transforms, in Triton.

`dequant_matmul` and `w4a8_gemm.w4a8_matmul` are the entry points. May import `layouts`, `autotune` and `gpu.common`; never
`gpu.attention` or `gpu.kv`.
"""
