"""From a configuration and a store to an evaluated run directory."""

from .._lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "training.run": "RunDirectory",
        "training.trainer": "Trainer sample_grid train",
        "training.evaluation": "evaluate evaluate_run",
        "training.launch": "launch",
    },
)
