"""The figures notebook by papermill over made-up sweeps, and the page it writes."""

import json
import re
from html.parser import HTMLParser

import pandas as pd
import pytest
from madeup import HYPOTHESES, made_up_samples, make_sweep
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.text import Text

from facevae.analysis.claims import SweepAnalysis
from facevae.analysis.figures import study_figures
from facevae.analysis.report import write_report
from facevae.analysis.results import load_sweep
from facevae.core import FaceVAEError
from facevae.plotting import figure_png, new_figure
from facevae.sweep.runner import execute_notebook
from facevae.sweep.status import status_text, sweep_status

# What a browser fetches by itself; a link that a reader may click would be another matter.
FETCHED = {"src", "srcset", "poster", "data", "background", "action"}
FIGURES = (
    "face_strip",
    "interval_masks",
    "free_pixels",
    "scatter_masks",
    "faces_masks",
    "interval_standalone",
    "interval_with_ssim",
    "ranks",
    "interval_best",
    "bars_masks",
    "bars_standalone",
    "bars_ssim_with",
    "visual_comparison",
    "sampled_faces",
    "latent_use",
    "training_curves",
)


class Page(HTMLParser):
    """Collects the tags of a page, what it would fetch, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.fetched, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [
            value for name, value in attrs if name in FETCHED or (tag == "link" and name == "href")
        ]

    def handle_data(self, data):
        self.words.append(data)


def assert_self_contained(path):
    """The page at `path` asks nothing of any server: every image is inside, no script, no foreign style."""
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
    execute_notebook("figures", folder / "out.ipynb", {"sweep": str(sweep)})
    return sweep


def test_the_executed_notebook_shows_whole_tables(study):
    notebook = json.loads((study.parent / "out.ipynb").read_text())
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", ())]
    texts = [
        "".join(output.get("text", output.get("data", {}).get("text/markdown", ""))) for output in outputs
    ]
    assert status_text(sweep_status(study)) + "\n" in texts, "the table of facevae status"
    for name in ("results_face", "verdicts"):
        assert (study / "tables" / f"{name}.md").read_text(encoding="utf-8") in texts


def test_everything_is_written(study):
    table = pd.read_csv(study / "results.csv")
    assert len(table) == 18 * 3 + 9 and {
        "hypothesis",
        "terms",
        "mask",
        "seed",
        "view",
        "images",
        "l1",
        "ssim",
    } <= set(table)
    for name in FIGURES:
        assert (study / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (study / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    assert {path.name for path in (study / "tables").iterdir()} == {
        f"{name}.{kind}"
        for kind in ("md", "tex")
        for name in ("results_face", "results_composite", "results_raw", "verdicts")
    }
    compared = pd.read_csv(study / "comparisons.csv")
    assert {
        "question",
        "label",
        "view",
        "metric",
        "improvement",
        "low",
        "high",
        "p_holm",
        "effect",
        "share_improved",
        "images",
        "seeds",
    } <= set(compared)
    assert (
        set(compared.question) == {"masks", "standalone", "with_ssim", "best"}
        and len(pd.read_csv(study / "claims.csv")) == 24
    )


def test_report_is_self_contained_and_says_what_is_missing(study):
    page = assert_self_contained(study / "report.html")
    words = " ".join(page.words)
    assert page.tags.count("img") == len(FIGURES)
    assert (
        "2 of 20 runs have no result" in words
        and "became nan at step 130" in words
        and "never started" in words
    )
    assert "LPIPS is absent" in words and "could not be downloaded" in words
    assert "This run cannot confirm or refute" in words and "one seed a hypothesis" in words


def test_the_page_answers_before_it_proves(study):
    """Answers, faces and all hypotheses come first; the rest has a place in the contents, and is folded."""
    text = re.sub(r"base64,[^\"]*", "", (study / "report.html").read_text(encoding="utf-8"))
    order = [
        "Do face masks help?",
        "the errors on the face are",
        'id="face_strip"',
        ">H10 <",
        "<nav",
        "<details>",
    ]
    places = [text.index(mark) for mark in order]
    assert places == sorted(places)
    assert text.count("<details>") >= 10 and text.count("</details>") == text.count("<details>")
    assert not re.search(r'class="(better|worse|against)', text.split("<details>")[0]), "verdicts are grey"


def test_a_part_of_the_study_is_reported_as_that_part(tmp_path):
    three = [one for one in HYPOTHESES if one["name"] in ("H4", "H7", "H8")]
    analysis = SweepAnalysis(load_sweep(make_sweep(tmp_path / "sweep", hypotheses=three)), resamples=100)
    figures = study_figures(analysis, made_up_samples(analysis.sweep.runs, 1))
    page = assert_self_contained(write_report(analysis, figures))
    words = " ".join(" ".join(page.words).split())
    assert "claims need hypotheses that were not asked for: H1, H2" in words
    assert "Do face masks help?" in words and "Which standalone loss" in words
    assert "Which of l1 and l2" not in words and "bars_ssim_with" not in figures
    assert "No pair of finished runs" not in words


def test_every_table_says_who_used_masks(study):
    words = " ".join(" ".join(Page((study / "report.html").read_text(encoding="utf-8")).words).split())
    masks = {one["name"]: "with masks " if one["mask"] else "" for one in HYPOTHESES}
    rows = re.findall(r"\b(H\d+) ((?:ssim|l1|l2)(?:\+l[12])?) (with masks )?[\d–m]", words)
    assert len(rows) >= 30, "the page has at least three tables of all hypotheses"
    assert {(name, used) for name, _, used in rows} == set(masks.items())


def test_executed_notebook_shows_the_figures(study):
    cells = json.loads((study.parent / "out.ipynb").read_text())["cells"]
    images = [
        output
        for cell in cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(images) == len(FIGURES)


@pytest.mark.parametrize("name", ["nothing", "one", "user"])
def test_partial_sweeps(name, tmp_path):
    mine = [
        {"name": "l1+l2", "terms": "l1+l2", "mask": False},
        {"name": "l1+l2+mask", "terms": "l1+l2", "mask": True},
    ]
    options = {
        "nothing": dict(hypotheses=HYPOTHESES[:1], seeds=(0,), missing=("H1", 0)),
        "one": dict(
            hypotheses=HYPOTHESES, seeds=(0, 1, 2), missing=None, failed=None, images=1, lpips=True, size=36
        ),
        "user": dict(hypotheses=mine, seeds=(3,)),
    }[name]
    sweep = make_sweep(tmp_path / "sweep", **options)
    if name == "one":
        for path in sweep.glob("H[2-9]*/*/metrics.parquet"):
            path.write_bytes(path.read_bytes()[:100])
        with open(sweep / "H1" / "seed0" / "log.jsonl", "a") as log:
            log.write('{"kind": "train", "st')
    study = load_sweep(sweep)
    analysis = SweepAnalysis(study, resamples=200)
    words = " ".join(assert_self_contained(write_report(analysis, study_figures(analysis))).words)
    assert {
        "nothing": "No run has finished yet",
        "one": "results cannot be used",
        "user": "over the loss l1+l2",
    }[name] in words


def test_names_and_errors_are_escaped(tmp_path):
    hostile = "<script>alert(1)<|script>"
    sweep = make_sweep(
        tmp_path / "sweep",
        hypotheses=[
            {"name": hostile, "terms": "l1", "mask": True},
            {"name": "$x_{", "terms": "l1", "mask": False},
        ],
        seeds=(0, 1),
        failed=(hostile, 1),
    )
    status = sweep / hostile / "seed1" / "status.json"
    status.write_text(json.dumps({"state": "failed", "error": "<img src=x onerror=alert(2)>"}))
    study = load_sweep(sweep)
    analysis = SweepAnalysis(study, resamples=200)
    page = assert_self_contained(write_report(analysis, study_figures(analysis)))
    words = " ".join(page.words)
    assert hostile in words and "<img src=x onerror=alert(2)>" in words and "$x_{" in words


def overlapping_texts(figure):
    """Pairs of a figure's visible texts that cover each other."""
    figure_png(figure, 100)
    renderer, boxes = figure.canvas.get_renderer(), []

    def walk(artist):
        if not artist.get_visible():
            return
        if isinstance(artist, Text) and artist.get_text().strip():
            boxes.append((artist.get_text(), artist.get_window_extent(renderer)))
        children = artist.get_children()
        if isinstance(artist, Axes) and not artist.axison:
            children = [child for child in children if not isinstance(child, Axis)]
        if isinstance(artist, Axis):
            low, high = sorted(artist.get_view_interval())
            ticks = [tick for tick in artist.get_major_ticks() if low <= tick.get_loc() <= high]
            children = [
                artist.label,
                artist.offsetText,
                *(label for tick in ticks for label in (tick.label1, tick.label2)),
            ]
        for child in children:
            walk(child)

    walk(figure)
    return [
        (a, b)
        for i, (a, first) in enumerate(boxes)
        for b, second in boxes[i + 1 :]
        if min(first.x1, second.x1) - max(first.x0, second.x0) > 1
        and min(first.y1, second.y1) - max(first.y0, second.y0) > 1
    ]


def test_no_labels_overlap(tmp_path):
    clash = new_figure(2, 2)
    clash.text(0.5, 0.5, "one"), clash.text(0.52, 0.5, "two")
    assert overlapping_texts(clash) == [("one", "two")]
    sweep = load_sweep(make_sweep(tmp_path / "sweep", seeds=(0, 1, 2), images=40, lpips=True))
    for name, figure in study_figures(
        SweepAnalysis(sweep, resamples=100), made_up_samples(sweep.runs, 1)
    ).items():
        assert not overlapping_texts(figure.figure), name


def test_claims_of_the_paper_and_your_own(study):
    """Every claim has a verdict with its numbers on the page, and a few lines add one's own."""
    (study / "claims.toml").write_text("""
        [[claim]]
        name = "mine"
        question = "Does l1 with masks beat l2 without?"
        statement = "Masks matter more than the exponent."
        first = "l2"
        second = "masked l1"
        metrics = ["l1", "ssim"]
        expect = "better"
    """)
    analysis = SweepAnalysis(load_sweep(study), resamples=200)
    words = " ".join(
        assert_self_contained(write_report(analysis, study_figures(analysis, names=["ranks"]))).words
    )
    assert len(analysis.claims) == 25 and all(statement in words for statement in analysis.claims.statement)
    assert "Does l1 with masks beat l2 without?" in words and "authors +" in words
    reproduced = (analysis.claims.verdict == "reproduced").sum()
    assert f"Of the 25 claims that could be judged in this run: {reproduced} reproduced" in words
    (study / "claims.toml").write_text('[[claim]]\nname = "mine"\nexpects = "better"\n')
    with pytest.raises(FaceVAEError, match="claims.toml.*question: Field required"):
        SweepAnalysis(load_sweep(study))
    (study / "claims.toml").unlink()


def test_a_directory_that_is_no_sweep(tmp_path):
    with pytest.raises(FaceVAEError, match="is not a sweep"):
        execute_notebook("figures", tmp_path / "out.ipynb", {"sweep": str(tmp_path)})
