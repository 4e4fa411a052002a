"""Public names of a package, imported when they are first asked for: importing the package costs nothing."""

from collections.abc import Callable
from importlib import import_module
from typing import Any


def lazy_names(
    package: str, modules: dict[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """What a package assigns to `__getattr__`, `__dir__` and `__all__`.

    package: its `__name__`.
    modules: {module: "names that it offers, separated by spaces"}; modules are named relative to facevae.
    """
    origin = {name: module for module, names in modules.items() for name in names.split()}

    def getattribute(name: str) -> Any:
        if name not in origin:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        return getattr(import_module(f"facevae.{origin[name]}"), name)

    return getattribute, lambda: sorted(origin), sorted(origin)
