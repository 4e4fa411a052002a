"""From a sweep directory to statistics, verdicts, figures and the report."""

from .._lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "analysis.results": "Sweep load_sweep",
        "analysis.statistics": "MetricValues compare compare_question estimate",
        "analysis.claims": "SweepAnalysis",
        "analysis.figures": "study_figures",
        "analysis.report": "write_figures write_markdown write_report write_tables",
    },
)
