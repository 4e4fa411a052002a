"""The figures notebook by papermill over made-up sweeps, and the page it writes."""
import json
import re
from html.parser import HTMLParser

import pandas as pd
import pytest
from madeup import HYPOTHESES, make_sweep

from facevae.core import FaceVAEError
from facevae.findings import Findings
from facevae.notebooks import execute
from facevae.report import study_figures, write_report
from facevae.sweeps import load_sweep

# What a browser fetches by itself; a link that a reader may click would be another matter.
FETCHED = {"src", "srcset", "poster", "data", "background", "action"}
FIGURES = ("interval_masks", "free_pixels", "scatter_masks", "faces_masks", "interval_standalone", "interval_with_ssim", "ranks", "interval_best", "bars_masks",
           "bars_standalone", "bars_ssim_with", "visual_comparison", "latent_use", "training_curves")


class Page(HTMLParser):
    """Collects the tags of a page, what it would fetch, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.fetched, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [value for name, value in attrs if name in FETCHED or (tag == "link" and name == "href")]

    def handle_data(self, data):
        self.words.append(data)


def assert_self_contained(path):
    """The page at `path` asks nothing of any server: every picture is inside, no script, no style from elsewhere."""
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.fetched and all(value.startswith("data:image/png;base64,") for value in page.fetched)
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    assert not re.search(r"@import|url\(|https?://", re.sub(r"base64,[^\"]*", "", text))
    return page


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("madeup")
    sweep = make_sweep(folder / "sweep")
    execute("figures", folder / "out.ipynb", {"sweep": str(sweep)})
    return sweep


def test_everything_is_written(study):
    table = pd.read_csv(study / "results.csv")
    assert len(table) == 18 * 3 + 9 and {"hypothesis", "terms", "mask", "seed", "view", "images", "l1", "ssim"} <= set(table)
    for name in FIGURES:
        assert (study / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (study / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")


def test_report_is_self_contained_and_says_what_is_missing(study):
    page = assert_self_contained(study / "report.html")
    words = " ".join(page.words)
    assert page.tags.count("img") == len(FIGURES)
    assert "2 of 20 runs have no result" in words and "became nan at step 130" in words and "never started" in words
    assert "LPIPS is absent" in words and "could not be downloaded" in words
    assert "masks lowered L1 from" in words


def test_every_table_says_who_used_masks(study):
    words = " ".join(" ".join(Page((study / "report.html").read_text(encoding="utf-8")).words).split())
    masks = {"H1": "no", "H2": "yes", "H3": "no", "H4": "yes", "H5": "no", "H6": "yes", "H7": "no", "H8": "yes", "H9": "yes", "H10": "no"}
    rows = re.findall(r"\b(H\d+) ((?:ssim|l1|l2)(?:\+l[12])?) (yes|no) [\d–m]", words)
    assert len(rows) >= 30, "the page has at least three tables of all hypotheses"
    assert {(name, used) for name, _, used in rows} == set(masks.items())


def test_executed_notebook_shows_the_figures(study):
    cells = json.loads((study.parent / "out.ipynb").read_text())["cells"]
    pictures = [output for cell in cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
    assert len(pictures) == len(FIGURES)


@pytest.mark.parametrize("name", ["nothing", "one", "user"])
def test_partial_sweeps(name, tmp_path):
    mine = [{"name": "l1+l2", "terms": "l1+l2", "mask": False}, {"name": "l1+l2+mask", "terms": "l1+l2", "mask": True}]
    options = {"nothing": dict(hypotheses=HYPOTHESES[:1], seeds=(0,), missing=("H1", 0)),
               "one": dict(hypotheses=HYPOTHESES, seeds=(0, 1, 2), missing=None, failed=None, images=1, lpips=True, size=36),
               "user": dict(hypotheses=mine, seeds=(3,))}[name]
    sweep = make_sweep(tmp_path / "sweep", **options)
    if name == "one":
        for path in sweep.glob("H[2-9]*/*/metrics.parquet"):
            path.write_bytes(path.read_bytes()[:100])
        with open(sweep / "H1" / "seed0" / "log.jsonl", "a") as log:
            log.write('{"kind": "train", "st')
    study = load_sweep(sweep)
    found = Findings(study, resamples=200)
    words = " ".join(assert_self_contained(write_report(found, study_figures(found))).words)
    assert {"nothing": "No run has finished yet", "one": "results cannot be used", "user": "l1+l2 (l1+l2 → l1+l2+mask)"}[name] in words


def test_names_and_errors_are_escaped(tmp_path):
    hostile = "<script>alert(1)<|script>"
    sweep = make_sweep(tmp_path / "sweep", hypotheses=[{"name": hostile, "terms": "l1", "mask": True},
                                                      {"name": "$x_{", "terms": "l1", "mask": False}], seeds=(0, 1), failed=(hostile, 1))
    status = sweep / hostile / "seed1" / "status.json"
    status.write_text(json.dumps({"state": "failed", "error": "<img src=x onerror=alert(2)>"}))
    study = load_sweep(sweep)
    found = Findings(study, resamples=200)
    page = assert_self_contained(write_report(found, study_figures(found)))
    words = " ".join(page.words)
    assert hostile in words and "<img src=x onerror=alert(2)>" in words and "$x_{" in words


def test_a_directory_that_is_no_sweep(tmp_path):
    with pytest.raises(FaceVAEError, match="is not a sweep"):
        execute("figures", tmp_path / "out.ipynb", {"sweep": str(tmp_path)})
