"""How fast it is: steps, evaluation and input, against a plain loop and the hardware's bound."""

from .._lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "bench.benchmark": "run_benchmark save_benchmark",
    },
)
