"""Fixtures that several test files share: a small store, and the command as a user runs it."""

import contextlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from filelock import FileLock

# Several tests run at a time, and so small that a second thread would mostly wait for the first.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent

# A shell that starts the tests in the background lets them, and every process they start, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Small enough that a run takes seconds, and still every stage of the real thing.
TINY = [
    part
    for setting in (
        "steps=8 width=0.1 latent_dim=8 batch_size=8 log_every=1 validate_every=4 checkpoint_every=2 "
        "val_images=8 test_images=8"
    ).split()
    for part in ("--set", setting)
]


def pytest_addoption(parser):
    parser.addoption("--run-slow", action="store_true", help="also run the tests marked slow")


# Files whose tests need little together and much alone: each may run in any process. Those of another file
# stay together, because they share what is made for them.
SPREAD = {"test_command", "test_faults", "test_hostile", "test_readme", "test_resume", "test_tutorials"}
# Of these, those that take long come first, so that no process works alone at the end.
LONG = {"test_faults", "test_resume", "test_tutorials"}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.split("::")[0]
            return nodeid if Path(file).stem in SPREAD else file

    return Scheduling(config, log)


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: item.path.stem not in LONG)
    for item in items:
        if "slow" in item.keywords and not config.getoption("--run-slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run by make test-slow"))


@pytest.fixture
def tally(record_property):
    """Counts faults injected, runs completed and differences found, for the summary of all tests."""

    def count(**numbers):
        for name, number in numbers.items():
            record_property(name, number)

    return count


def pytest_terminal_summary(terminalreporter):
    reports = [one for kind in ("passed", "failed") for one in terminalreporter.stats.get(kind, ())]
    counts = dict.fromkeys(("faults", "runs", "differences"), 0)
    for name, number in (
        one for report in reports if report.when == "call" for one in report.user_properties
    ):
        counts[name] = counts.get(name, 0) + number
    if counts["faults"]:
        text = "Faults injected: {faults}; runs completed: {runs}; differences found: {differences}"
        terminalreporter.write_line(text.format(**counts))


def facevae(*arguments, cwd=None, check=True, **variables):
    """Run the facevae command; returns the finished process, its output as text."""
    done = subprocess.run(
        [str(Path(sys.executable).parent / "facevae"), *map(str, arguments)],
        cwd=cwd,
        text=True,
        capture_output=True,
        env=os.environ | {"COLUMNS": "120"} | variables,
    )
    if check:
        assert done.returncode == 0, f"facevae {' '.join(map(str, arguments))}\n{done.stdout}{done.stderr}"
    return done


def facevae_here(*arguments):
    """Run the facevae command in this process, which imports torch once; gives returncode, stdout, stderr."""
    from facevae.cli.app import main

    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["facevae", *map(str, arguments)]),
        mock.patch.dict(os.environ, {"COLUMNS": "120"}),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
            code = 0
        except SystemExit as ending:
            code = ending.code or 0
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def rewrite(path, **changes):
    """Change fields of a JSON file that the library has written, as it would have written them."""
    from facevae.safe_io import read_object, write_object

    write_object(path, read_object(path) | changes)


@contextlib.contextmanager
def forgotten():
    """What is registered meanwhile is forgotten afterwards."""
    from facevae.registry import PLUGINS, REGISTRIES

    kept = [(table, dict(table)) for registry in REGISTRIES for table in (registry, registry.plugins)]
    kept.append((PLUGINS, dict(PLUGINS)))
    yield
    for table, before in kept:
        table.clear()
        table.update(before)


def let_manifest_agree(store, *names):
    """Give a store's manifest the digests that its files have now."""
    from facevae.core import file_digest
    from facevae.safe_io import read_object

    digests = read_object(store / "manifest.json")["sha256"]
    digests |= {name: file_digest(store / name) for name in names}
    rewrite(store / "manifest.json", sha256=digests)


def contents(folder):
    """What the files below a folder hold, by their paths in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def peak_growth(function) -> int:
    """Bytes by which the memory of this process grew at its highest while the function ran."""

    def status(field):
        return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far
    except OSError:
        pytest.skip("the peak of memory cannot be reset here")
    before = status("VmRSS")
    function()
    return status("VmHWM") - before


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """Makes things that all of a test session read, each once: shared(name, make) gives its folder."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    root.mkdir(exist_ok=True)

    def once(name, make):
        path, made = root / name, root / f"{name}.made"
        with FileLock(root / f"{name}.lock"):
            if not made.exists():
                shutil.rmtree(path, ignore_errors=True)
                path.mkdir()
                make(path)
                made.touch()
        return path

    return once


@pytest.fixture(scope="session")
def store(shared):
    """100 drawn faces of 36 pixels."""
    arguments = ["pack", "synthetic", "--count", 100, "--seed", 0, "--size", 36]
    return shared("faces", lambda folder: facevae(*arguments, "--out", folder / "store")) / "store"


@pytest.fixture(scope="session")
def study(store, shared):
    """A finished study of H5, H9 and l1+l2+mask with two seeds, made by the command; tests change copies."""

    def make(folder):
        hypotheses = ["--hypotheses", "H5,H9,l1+l2+mask", "--seeds", "0,1"]
        done = facevae("ablate", "--data", store, "--out", folder / "sweep", *hypotheses, *TINY)
        assert str(folder / "sweep" / "report.html") in done.stdout

    return shared("study", make) / "sweep"


@pytest.fixture(scope="session")
def stand_in(shared):
    """For PYTHONPATH: a copy of the library that executes stand_in/train.ipynb instead of training.

    Its reports show one figure.
    """

    def make(folder):
        ignored = shutil.ignore_patterns("models", "__pycache__")
        shutil.copytree(ROOT / "facevae", folder / "facevae", ignore=ignored)
        shutil.copytree(ROOT / "nbs" / "experiments", folder / "facevae" / "experiments")
        shutil.copy(ROOT / "tests" / "stand_in" / "train.ipynb", folder / "facevae" / "experiments")
        figures = folder / "facevae" / "experiments" / "figures.ipynb"
        all_figures, one_figure = "study_figures(analysis)", "study_figures(analysis, names=['ranks'])"
        assert all_figures in figures.read_text()
        figures.write_text(figures.read_text().replace(all_figures, one_figure))

    return shared("stand-in", make)
