"""quantkit: quantize language models, run them, and measure what quantization cost.

From Python:

    from quantkit import LLM, SamplingParams, evaluate, quantize

    quantize("demo", "demo-w4", recipe="gptq-w4")
    report = evaluate("demo-w4", baseline="demo")
    print(report.model.metrics.kl_mean)
    (output,) = LLM("demo-w4").generate("The capital of France is", SamplingParams(temperature=0))
    print(output.text)

`import quantkit` itself is cheap: each name below is imported when it is first used (PEP 562).
"""

from importlib import import_module
from typing import TYPE_CHECKING

from quantkit.version import __version__

__all__ = ["LLM", "Recipe", "SamplingParams", "__version__", "evaluate", "quantize"]

if TYPE_CHECKING:
    from quantkit.api import LLM, evaluate, quantize
    from quantkit.recipe import Recipe
    from quantkit.runtime.core.request import SamplingParams
else:
    #: Public name -> module that defines it.
    _LAZY = {
        "LLM": "quantkit.api",
        "Recipe": "quantkit.recipe",
        "SamplingParams": "quantkit.runtime.core.request",
        "evaluate": "quantkit.api",
        "quantize": "quantkit.api",
    }

    def __getattr__(name: str) -> object:
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(_LAZY[name]), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
