"""What can be done with a latent space: interpolation, attribute directions, edited photos."""

from .._lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "editing.photos": "reconstruct_files",
        "editing.latent_space": "find_direction find_directions interpolate traverse",
        "model.sampling": "sample_posterior sample_prior",
        "editing.animation": "save_gif save_mp4",
    },
)
