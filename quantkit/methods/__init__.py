"""Quantization methods: functions from tensors to a `QuantizedWeight`. This room knows no model and no file.

A method is one file here that defines a `Method`, and one line of `METHODS`. Imports torch and, for the registry,
`quantkit.utils`; reading the names in `METHODS` imports neither torch nor any method.
"""

from typing import TYPE_CHECKING

from quantkit.utils.registry import Registry

if TYPE_CHECKING:
    from quantkit.methods.base import Method

#: Value of a recipe's `method` and of `--method` -> method.
METHODS: "Registry[Method]" = Registry(
    "method",
    {
        "rtn": ("quantkit.methods.rtn:METHOD", "Round to nearest. Needs no calibration data."),
        "awq": (
            "quantkit.methods.awq:METHOD",
            "Scale important input channels up before rounding; clip ranges.",
        ),
        "gptq": (
            "quantkit.methods.gptq:METHOD",
            "Round column by column; later columns absorb earlier errors.",
        ),
        "awq+gptq": ("quantkit.methods.awq_gptq:METHOD", "AWQ's channel scales, then GPTQ."),
    },
)
