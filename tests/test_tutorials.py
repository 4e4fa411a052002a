"""The tutorials run from their first cell to their last, and what is stored of their outputs is small."""

import json
import os
import re
from pathlib import Path

import nbformat
import papermill
import pytest

TUTORIALS = sorted((Path(__file__).resolve().parent.parent / "nbs" / "tutorials").glob("*.ipynb"))
SHORT = {"steps": 8, "faces": 100}  # parameters of those that train


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_tutorial_runs(path, tmp_path):
    known = papermill.inspect_notebook(str(path))
    parameters = {name: value for name, value in SHORT.items() if name in known}
    papermill.execute_notebook(
        str(path),
        str(tmp_path / path.name),
        parameters,
        cwd=tmp_path,
        kernel_name="python3",
        progress_bar=False,
    )
    executed = nbformat.read(tmp_path / path.name, as_version=4)
    assert not [
        output
        for cell in executed.cells
        for output in cell.get("outputs", ())
        if output.output_type == "error"
    ]


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_tutorial_is_small_and_shows_its_results(path):
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert os.path.getsize(path) < 800_000 and kinds & {"image/png", "image/jpeg"} and "text/html" in kinds
    assert not [
        output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"
    ]


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_tutorial_links_lead_somewhere(path):
    text = "\n".join(
        "".join(cell["source"])
        for cell in json.loads(path.read_text())["cells"]
        if cell["cell_type"] == "markdown"
    )
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert "://" in target or (path.parent / target).exists(), f"{target} is not there"
