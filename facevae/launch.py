"""`accelerate launch -m facevae.launch` and `python -m facevae.launch`: see `facevae.training.launch`."""

import sys

from facevae._paths import search_path

if __name__ == "__main__":
    sys.path[:] = search_path()  # before anything else is imported: -m puts the working directory first

import typer

from facevae.training.launch import launch, main

__all__ = ["launch", "main"]

if __name__ == "__main__":
    typer.run(main)
