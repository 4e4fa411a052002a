"""From a sweep directory to statistics, verdicts, figures and the report."""

from .._lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "analysis.results": "Sweep load_sweep",
        "analysis.statistics": "compare",
        "analysis.report": "write_report",
    },
)
