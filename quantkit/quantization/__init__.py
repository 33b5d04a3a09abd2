"""The quantization job: read a model block by block, calibrate, quantize, write the artifact, resume.

`run` is the entry, `pipeline` the loop over blocks, `block` one block, `calibration` its forward passes. Only the command line
and `quantkit.api` import this room.
"""
