"""Quantization methods: functions from tensors to a `QuantizedWeight`. Imports torch only; knows no model and no file."""
