"""The facevae command."""

from .._lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "cli.app": "app main",
    },
)
