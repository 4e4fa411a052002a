"""`accelerate launch -m facevae.launch` and `python -m facevae.launch`: see `facevae.training.launch`."""

import typer

from facevae.training.launch import launch, main

__all__ = ["launch", "main"]

if __name__ == "__main__":
    typer.run(main)
