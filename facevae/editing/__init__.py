"""What can be done with a latent space: interpolation, attribute directions, edited photographs."""

from .._lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "editing.latent_space": "find_directions interpolate sample_prior sample_posterior traverse",
        "editing.animation": "save_gif save_mp4",
    },
)
