"""The public names of the packages, and the import paths of before the library had subpackages."""

import importlib
import pkgutil
import warnings

import pytest

import facevae

SHOWN = {
    "animation": "save_gif to_frames",
    "comparison": "Scores compare",
    "core": "FaceVAEError",
    "evaluation": "evaluate_run",
    "explorer": "LatentExplorer",
    "explorer_page": "open_explorer",
    "findings": "Findings",
    "hypotheses": "check_parameters make_config parse_settings",
    "latent": "Encoded decode directions_table interpolate sample_posterior sample_prior traverse",
    "latent_directions": "find_directions",
    "launch": "launch",
    "loader": "Batches",
    "model": "FaceVAE",
    "photograph": "encode_pictures",
    "plates": "study_figures",
    "report": "write_figures write_report write_tables",
    "report_markdown": "write_markdown",
    "run": "RunDirectory",
    "samples": "sample_rows tile",
    "sources": "SyntheticSource",
    "status": "sweep_status",
    "store": "FaceStore pack",
    "sweeps": "load_sweep",
    "synthetic": "draw_faces",
    "training": "train",
}
HERE_TO_STAY = {"core", "launch", "model", "synthetic", "training"}


@pytest.mark.parametrize("module", SHOWN)
def test_an_import_path_of_before_still_works_and_says_what_it_is_now(module):
    for name in SHOWN[module].split():
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            found = getattr(importlib.import_module(f"facevae.{module}"), name)
        assert callable(found)
        said = [
            str(one.message)
            for one in warned
            if f"facevae.{module}.{name} is now facevae." in str(one.message)
        ]
        assert bool(said) == (module not in HERE_TO_STAY), said


PACKAGES = [
    "facevae",
    *(f"facevae.{one.name}" for one in pkgutil.iter_modules(facevae.__path__) if one.ispkg),
]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_can_be_had(package):
    found = importlib.import_module(package)
    assert found.__all__ and all(getattr(found, name) is not None for name in found.__all__)
    assert set(dir(found)) == set(found.__all__)


def test_a_name_that_is_gone_is_an_import_error():
    with pytest.raises(ImportError, match="contact"):
        from facevae.store import contact_sheets  # noqa: F401
