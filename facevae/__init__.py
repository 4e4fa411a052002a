"""Train, compare and explore variational autoencoders of faces, with and without face masks."""

import os

from . import _moved  # noqa: F401  import paths of before
from ._lazy import lazy_names

# Threads that wait for each other spin for a fraction of a millisecond and then sleep: spinning for long, as
# they do by default, makes two trainings on one machine slow each other tenfold. The thread library reads
# this when torch is imported, and child processes inherit it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

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
