"""The variational autoencoder, its losses, and what a trained one can do."""

from .._lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "config": "ModelConfig",
        "model.vae": "FaceVAE paste_background",
        "model.losses": "loss_terms",
    },
)
