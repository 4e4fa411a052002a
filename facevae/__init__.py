"""Train, compare and explore variational autoencoders of faces, with and without face masks."""

from . import _moved  # noqa: F401  import paths of before
from ._lazy import lazy_names

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "core": "FaceVAEError",
        "data.store": "FaceStore",
        "data.packing": "pack",
        "data.sources": "FolderSource",
        "data.celeba": "CelebASource CelebAMaskHQSource",
        "synthetic.render": "SyntheticSource draw_faces",
        "registry": "load_plugin register_network register_term",
        "config": "HYPOTHESES ModelConfig RunConfig make_config",
        "metrics.tables": "register_metric",
        "model.vae": "FaceVAE",
        "training.trainer": "train",
        "training.evaluation": "evaluate evaluate_run",
        "sweep.scheduler": "run_sweep",
        "analysis.results": "load_sweep",
        "explore.explorer": "LatentExplorer",
    },
)
