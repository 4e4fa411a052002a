"""Many runs: planned, executed by papermill under Dask, watched, gone on with."""

from .._lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "sweep.plan": "read_sweep",
        "sweep.status": "sweep_status",
        "sweep.scheduler": "run_sweep",
    },
)
