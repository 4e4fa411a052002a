"""Fixtures that several test files share: a small store, and the command as a user runs it."""

import contextlib
import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

# A shell that starts the tests in the background lets them, and every process they start, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Small enough that a run takes seconds, and still every stage of the real thing.
TINY = [
    "--set",
    "steps=8",
    "--set",
    "width=0.1",
    "--set",
    "latent_dim=8",
    "--set",
    "batch_size=8",
    "--set",
    "log_every=1",
    "--set",
    "validate_every=4",
    "--set",
    "checkpoint_every=2",
    "--set",
    "val_images=8",
    "--set",
    "test_images=8",
]


def pytest_addoption(parser):
    parser.addoption("--run-slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; run by make test-slow")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--run-slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: run by make test-slow"))


COUNTS = {"faults": 0, "runs": 0, "differences": 0}


@pytest.fixture
def tally(record_property):
    """Counts faults injected, runs completed and differences found, for the test's record and the summary of all."""

    def count(**numbers):
        for name, number in numbers.items():
            COUNTS[name] += number
            record_property(name, number)

    return count


def pytest_terminal_summary(terminalreporter):
    if COUNTS["faults"]:
        terminalreporter.write_line(
            "Faults injected: {faults}; runs completed: {runs}; differences found: {differences}".format(
                **COUNTS
            )
        )


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
    """Run the facevae command in this process, which spares importing torch again; gives returncode, stdout, stderr."""
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


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """100 drawn faces of 36 pixels."""
    path = tmp_path_factory.mktemp("data") / "store"
    facevae("pack", "synthetic", "--count", 100, "--seed", 0, "--size", 36, "--out", path)
    return path
