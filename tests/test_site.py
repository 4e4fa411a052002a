"""The site of the notebooks: everything is in it once, and no link in it is dead."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from check_code import LIBRARY

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def site_pages(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import site_pages

    return site_pages


def leaves(entry):
    if isinstance(entry, str):
        return [entry]
    return [leaf for part in (entry.values() if isinstance(entry, dict) else entry) for leaf in leaves(part)]


def test_the_site_has_every_notebook_and_every_module_once(site_pages):
    pages = leaves(site_pages.navigation())
    notebooks = {str(path.relative_to(ROOT / "nbs")) for path in (ROOT / "nbs").rglob("*.ipynb")}
    named = [page for page in pages if page.endswith(".ipynb")]
    assert set(named) == {path for path in notebooks if ".ipynb_checkpoints" not in path}
    assert max(Counter(pages).values()) == 1
    first = [page for page in named if page != "index.ipynb"][:5]
    assert first == [f"{name}.ipynb" for name in site_pages.METHOD], "the method comes first"
    modules = [module for of_package in site_pages.packages().values() for module in of_package]
    paths = [ROOT / (module.replace(".", "/") + ".py") for module in modules]
    public = {path for path in LIBRARY.values() if not path.stem.startswith("_")}
    assert set(paths) == public and len(paths) == len(public)


def test_a_dead_link_of_the_site_is_named(site_pages, tmp_path, caplog):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.html").write_text('<h2 id="There">There</h2>')
    (tmp_path / "sub" / "a.html").write_text(
        '<a class="x" href="../b.html#there">well</a><a href="../b.html#gone">no heading</a>'
        '<img alt="" src="missing.png"><a href="https://example.org/elsewhere">not ours</a>'
    )
    site_pages.on_post_build(type("Config", (), {"site_dir": str(tmp_path)}))
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert "../b.html#gone" in messages[0] + messages[1] and "missing.png" in messages[0] + messages[1]


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="make docs installs what builds the site")
    untracked = ["git", "ls-files", "--others", "--exclude-standard"]
    before = subprocess.run(untracked, cwd=ROOT, capture_output=True, text=True)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", "docs/mkdocs.yml"]
    built = subprocess.run(
        [*command, "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0 and "WARNING" not in built.stderr, built.stderr[-3000:]
    assert (tmp_path / "site" / "index.html").is_file()
    after = subprocess.run(untracked, cwd=ROOT, capture_output=True, text=True)
    assert after.stdout == before.stdout, "what is left beside the sources is ignored by git"
