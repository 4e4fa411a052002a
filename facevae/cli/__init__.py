"""The facevae command."""

import sys

from .._lazy import lazy_names
from .._paths import search_path

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "cli.app": "app",
    },
)
__all__ += ["main"]


def main() -> None:
    """The entry point of the `facevae` command, which imports nothing from where it happens to run."""
    sys.path[:] = search_path()
    from ..children import use_utf8
    from .app import main

    use_utf8()
    main()
