"""The facevae command."""

import sys

from .._lazy import lazy_names
from .._paths import search_path

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "cli.app": "app main",
    },
)


def main() -> None:
    """The entry point of the `facevae` command: `app.main`, with nothing imported from where it runs."""
    sys.path[:] = search_path()
    from ..children import use_utf8
    from .app import main

    use_utf8()
    main()
