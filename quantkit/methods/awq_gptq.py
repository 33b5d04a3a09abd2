"""AWQ's channel scales, then GPTQ: the scales are chosen for what GPTQ will lose, not for what plain rounding would."""

from quantkit.methods.base import Method
from quantkit.methods.gptq import quantize_gptq

METHOD = Method("awq+gptq", calibrates=True, scales_channels=True, compensates_errors=True, quantize=quantize_gptq)
