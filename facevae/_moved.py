"""Import paths of before the subpackages: they work, with a DeprecationWarning, until version 0.2."""

import importlib
import sys
import warnings
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {
    "animation": ["editing.animation"],
    "comparison": ["analysis.statistics"],
    "evaluation": ["training.evaluation", "metrics.tables"],
    "explorer": ["explore.explorer"],
    "explorer_page": ["explore.server"],
    "findings": ["analysis.claims"],
    "hypotheses": ["config"],
    "latent": ["editing.latent_space", "model.sampling"],
    "latent_directions": ["editing.latent_space"],
    "loader": ["data.loader"],
    "photograph": ["model.inference"],
    "plates": ["analysis.figures"],
    "report": ["analysis.report"],
    "report_markdown": ["analysis.report"],
    "run": ["training.run", "training.source_code", "training.files"],
    "samples": ["training.trainer"],
    "sources": ["data.sources", "data.celeba", "synthetic.render"],
    "status": ["sweep.status"],
    "store": ["data.store", "data.packing"],
    "sweeps": ["analysis.results"],
}
RENAMED = {
    "Encoded": "EncodedFaces",
    "Findings": "SweepAnalysis",
    "Scores": "MetricValues",
    "decode": "decode_latents",
    "encode_pictures": "encode_images",
    "tile": "labelled_rows",
}


class MovedModules:
    """Finds `facevae.OLD` as a module that fetches each name from where it is, by its name of today."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        package, _, old = name.partition(".")
        return ModuleSpec(name, MovedModules) if package == "facevae" and old in MOVED else None

    @staticmethod
    def create_module(spec: ModuleSpec) -> None:
        return None

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        homes = MOVED[module.__name__.partition(".")[2]]

        def getattribute(name: str) -> Any:
            new = RENAMED.get(name, name)
            for home in homes:
                found = importlib.import_module(f"facevae.{home}")
                if hasattr(found, new):
                    text = f"{module.__name__}.{name} is now facevae.{home}.{new}"
                    warnings.warn(text, DeprecationWarning, stacklevel=2)
                    return getattr(found, new)
            raise AttributeError(
                f"{name} is no longer in {module.__name__}; see {', '.join(homes)} in facevae"
            )

        module.__getattr__ = getattribute


sys.meta_path.append(MovedModules)
