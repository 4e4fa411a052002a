"""The variational autoencoder, its losses, and what a trained one can do."""

from .._lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "config": "ModelConfig",
        "model.inference": "Reconstruction decode_images encode_images",
        "model.vae": "FaceVAE FaceVAEOutput paste_background",
        "model.losses": "loss_terms weight_terms",
        "model.keras": "load_keras",
        "model.sampling": "decode_latents encode_store sample_distances sample_posterior sample_prior",
    },
)
