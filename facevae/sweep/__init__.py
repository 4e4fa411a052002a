"""Many runs: planned, executed by papermill in processes of their own, watched, gone on with."""

from .._lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "sweep.plan": "RunSpec plan_sweep read_sweep",
        "sweep.status": "status_text sweep_status",
        "sweep.scheduler": "run_sweep",
    },
)
