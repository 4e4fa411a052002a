"""Faces and label maps: sources, stores on disk, batches of them."""

from .._lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "data.store": "FaceStore image_grid",
        "data.images": "open_images",
        "data.packing": "FaceBatch Skipped pack",
        "data.sources": "FolderSource",
        "data.celeba": "CelebASource CelebAMaskHQSource",
        "data.loader": "Batches face_mask",
    },
)
