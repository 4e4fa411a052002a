"""Where this Python looks for modules, but for where it happens to run."""

import os
import sys


def _real(folder: str) -> str:
    try:
        return os.path.realpath(folder)
    except OSError:  # of a working directory that was deleted
        return ""


def search_path() -> list[str]:
    """The directories for `sys.path`, here and in child processes.

    The working directory is left out: a file in it may be called as a module is. What PYTHONPATH adds comes
    last: it offers what is found nowhere else, and replaces nothing. Of several facevae, this one is found.
    """
    variable = os.environ.get("PYTHONPATH")
    added = {_real(folder) for folder in variable.split(os.pathsep)} if variable else set()
    here, first = _real(os.curdir), sys.path[0]
    found = []
    for folder in filter(os.path.isabs, sys.path):
        if _real(folder) != here or (folder != first and here not in added):
            found.append(folder)
    found.sort(key=lambda folder: _real(folder) in added)
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    has_facevae = [os.path.isfile(os.path.join(folder, "facevae", "__init__.py")) for folder in found]
    found.insert([*has_facevae, True].index(True), package)
    return list(dict.fromkeys(found))
