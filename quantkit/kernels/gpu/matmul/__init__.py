"""Products of quantized matrices (W4A16, W4A8), dequantization and Hadamard transforms, in Triton."""
