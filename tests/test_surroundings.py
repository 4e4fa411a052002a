"""What surrounds a run stays outside: where it is started, who else's files lie there, what room there is.

Runs are those of the stand-in notebook, which take two seconds.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from check_code import processes_start_in_one_place, processes_started
from conftest import TINY, facevae_here
from faults import COMMAND, finished, locks_of, read, run_of, state_of, step_of, sweep_process, wait_until

linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux alone has this")
SETTINGS = [*TINY[1::2], "steps=40", "checkpoint_every=4"]
QUICK = [part for setting in (*TINY[1::2], "steps=2") for part in ("--set", setting)]


# Children and kernels


def strangers(folder: Path) -> Path:
    """A directory of modules that leave a file when they are executed, and of settings that break things."""
    folder.mkdir()
    for name in "torch papermill jupyter_client ipykernel_launcher IPython tomllib random json numpy".split():
        text = f"open({str(folder / 'ran')!r}, 'a').write({name!r})\nraise ImportError('a stranger ran')\n"
        (folder / f"{name}.py").write_text(text)
    (folder / "matplotlibrc").write_text("backend: no-such-backend\nfont.size: 99\n")
    return folder


def hostile(folder: Path) -> dict[str, str]:
    """Environment variables of somebody who has set up everything, and everything otherwise."""
    home, ran = folder / "home", folder / "ran"
    startup = home / ".ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "a.py").write_text(f"open({str(ran)!r}, 'a').write('IPython startup')")
    (home / "start.py").write_text(f"open({str(ran)!r}, 'a').write('PYTHONSTARTUP')")
    kernel = {"argv": ["/bin/false"], "display_name": "Another", "language": "python"}
    for where in (folder / "jupyter" / "kernels" / "python3", home / ".local/share/jupyter/kernels/python3"):
        where.mkdir(parents=True)
        (where / "kernel.json").write_text(json.dumps(kernel))
    (folder / "dask.yaml").write_text("{ not yaml")
    temporary = folder / ("a-directory-of-a-batch-job-" * 5)
    temporary.mkdir()
    python = {
        "PYTHONSTARTUP": str(home / "start.py"),
        "PYTHONOPTIMIZE": "2",
        "PYTHONWARNINGS": "error:x:UserWarning",
    }
    locale = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    jupyter = {"JUPYTER_PATH": str(folder / "jupyter"), "IPYTHONDIR": str(home / ".ipython")}
    place = {"LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "2", "ACCELERATE_MIXED_PRECISION": "fp8"}
    other = {"MPLBACKEND": "no-such-backend", "DASK_CONFIG": str(folder / "dask.yaml"), "FACEVAE_LOCK": "x:y"}
    return python | locale | jupyter | place | other | {"HOME": str(home), "TMPDIR": str(temporary)}


def without_network() -> list[str]:
    """What a command begins with to have no network, not even loopback, where the system lets us."""
    isolated = ["unshare", "--net"]
    can = shutil.which("unshare") and not subprocess.run([*isolated, "true"], capture_output=True).returncode
    return isolated if can else []


def test_a_run_takes_nothing_from_where_it_runs(store, stand_in, tmp_path):
    here = strangers(tmp_path / "here")
    before = sorted(here.iterdir())
    path = os.pathsep.join([str(stand_in), "", str(here)])  # an empty part is the working directory
    out = tmp_path / "Größe {steps}"  # which papermill would fill in
    command = [
        *without_network(),
        COMMAND,
        "train",
        "--hypothesis",
        "H3",
        "--data",
        store,
        "--out",
        out,
        *QUICK,
    ]
    environment = os.environ | hostile(tmp_path) | {"PYTHONPATH": path}
    done = subprocess.run(list(map(str, command)), cwd=here, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert state_of(out) == "done" and (out / "metrics.parquet").exists()
    assert sorted(here.iterdir()) == before and not (tmp_path / "ran").exists()


def test_a_kernel_takes_nothing_from_where_it_runs(tmp_path, monkeypatch):
    """As papermill and the explorer start theirs."""
    from jupyter_client import KernelManager

    from facevae.children import kernel_specs, private_surroundings

    monkeypatch.chdir(strangers(tmp_path / "here"))
    for name, value in hostile(tmp_path).items():
        if not name.startswith(("LC_", "TMPDIR")):
            monkeypatch.setenv(name, value)
    code = "import json, os, sys, facevae, random, matplotlib; rank = os.environ.get('WORLD_SIZE'); "
    code += "size = matplotlib.rcParams['font.size']; "
    code += "print(json.dumps([facevae.__file__, sys.path, rank, size, sys.flags.optimize]))"
    with private_surroundings() as folder:
        manager = KernelManager(kernel_name="python3", kernel_spec_manager=kernel_specs()())
        manager.start_kernel(cwd=folder)
        client = manager.blocking_client()
        client.start_channels()
        try:
            client.wait_for_ready(timeout=60)
            said = []
            reply = client.execute_interactive(code, timeout=60, output_hook=said.append)
        finally:
            client.stop_channels()
            manager.shutdown_kernel(now=True)
    assert reply["content"]["status"] == "ok", reply["content"]
    text = "".join(one["content"].get("text", "") for one in said if one["msg_type"] == "stream")
    library, path, rank, size, optimize = json.loads(text)
    assert library == sys.modules["facevae"].__file__ and "" not in path and os.getcwd() not in path
    assert (rank, size, optimize) == (None, 10.0, 0)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "here" / "ran").exists()


def test_figures_of_the_command_have_our_style_alone():
    import matplotlib

    from facevae.plotting import styled

    with matplotlib.rc_context({"lines.linestyle": ":", "savefig.dpi": 7}):
        assert styled(
            lambda: (matplotlib.rcParams["lines.linestyle"], matplotlib.rcParams["savefig.dpi"])
        )() == (
            "-",
            "figure",
        )
        assert matplotlib.rcParams["savefig.dpi"] == 7


@pytest.mark.parametrize(
    "text",
    [
        "import subprocess\nsubprocess.run(['x'])",
        "from subprocess import Popen",
        "import os\nos.execv('x', [])",
        "import os\nos.posix_spawn('x', [], {})",
        "import os\nthread(target=os.fork)",
        "import multiprocessing\nmultiprocessing.Process()",
        "from concurrent import futures\nfutures.ProcessPoolExecutor()",
        "import psutil\npsutil.Popen('x')",
        "import webbrowser\nwebbrowser.open('x')",
    ],
)
def test_processes_are_started_in_one_place(text):
    assert list(processes_started(text)), text


def test_no_module_starts_a_process_otherwise():
    assert list(processes_start_in_one_place()) == []
    assert not list(processes_started("import subprocess\ndef f(process: subprocess.Popen): process.wait()"))


# Paths that are not UTF-8


def commands():
    """(words of the command, its parameters) of everything that the command line offers."""
    from facevae.cli.app import app

    group = typer.main.get_command(app)
    for name, command in sorted(group.commands.items()):
        if hasattr(command, "commands"):
            yield from (([name, sub], each.params) for sub, each in sorted(command.commands.items()))
        else:
            yield [name], command.params


def test_a_path_that_is_not_utf8_is_refused_by_every_option(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bad, count = os.fsdecode(b"f\xe4ces"), 0
    for words, parameters in commands():
        for parameter in parameters:
            if parameter.is_flag if hasattr(parameter, "is_flag") else False:
                continue
            given = [bad] if parameter.param_type_name == "argument" else [parameter.opts[0], bad]
            done = facevae_here(*words, *given)
            assert done.returncode == 1 and "f\\udce4ces' is not UTF-8" in done.stderr, (
                words,
                given,
                done.stderr,
            )
            assert done.stderr.count("\n") == 1
            count += 1
    assert count > 50 and not list(tmp_path.iterdir())


@linux
def test_a_working_directory_that_is_not_utf8_or_gone(tmp_path, monkeypatch):
    place = Path(os.fsdecode(os.fsencode(tmp_path) + b"/f\xe4ces"))
    place.mkdir()
    monkeypatch.chdir(place)
    assert "is not UTF-8" in facevae_here("status", "sweep").stderr
    place.rmdir()
    assert "working directory is not there any more" in facevae_here("status", "sweep").stderr


# Directories that go away


def test_a_sweep_whose_directory_goes_away_stops_and_makes_nothing_anew(
    store, stand_in, tmp_path, monkeypatch
):
    monkeypatch.chdir(stand_in)  # python -c looks there first
    out = tmp_path / "sweep"
    environment = {"PYTHONPATH": str(stand_in), "FACEVAE_HEARTBEAT": "0.3"}
    process = sweep_process(store, out, "H3,H5,H9", SETTINGS, environment)
    first = run_of(out, "H3")
    wait_until(lambda: step_of(first) >= 6, "step 6", process=process)
    out.rename(tmp_path / "elsewhere")
    out.mkdir()  # by somebody else: all the harder to notice
    output, _ = process.communicate(timeout=60)
    assert process.returncode and "Traceback" not in output, output
    assert "is not there any more, or another directory is in its place" in output, output
    assert not list(out.iterdir())


def test_a_run_whose_directory_goes_away_stops_and_makes_nothing_anew(store, stand_in, tmp_path):
    out = tmp_path / "run"
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    command = [COMMAND, "train", "--hypothesis", "H3", "--data", str(store), "--out", str(out), *settings]
    environment = os.environ | {"PYTHONPATH": str(stand_in), "FACEVAE_HEARTBEAT": "0.3"}
    process = subprocess.Popen(command, env=environment, text=True, stderr=subprocess.PIPE)
    wait_until(lambda: step_of(out) >= 6, "step 6", process=process)
    out.rename(tmp_path / "elsewhere")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "is not there any more" in errors and "Traceback" not in errors, errors
    assert not out.exists()


# No room

FAULTS = {
    "H1": 'raise OSError(28, "No space left on device", out)',
    "H6": "os.kill(os.getpid(), signal.SIGKILL)",
}


@pytest.fixture
def without_room(stand_in, tmp_path):
    """The stand-in, where each hypothesis ends at step 6 in a way of its own as long as a file is there."""
    library, full = tmp_path / "library", tmp_path / "full"
    shutil.copytree(stand_in, library)
    path = library / "facevae" / "experiments" / "train.ipynb"
    notebook = json.loads(path.read_text())
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        mark = "        done = step + 1\n"
        check = (
            f"        if done == 6 and Path({str(full)!r}).exists():\n            exec(FAULTS[hypothesis])\n"
        )
        if mark in source:
            start = f"import os, signal\nfrom pathlib import Path\n\nFAULTS = {FAULTS!r}\n"
            source = start + source.replace(mark, mark + check)
        cell["source"] = source
    path.write_text(json.dumps(notebook))
    full.touch()
    return library, full


def test_no_room_interrupts_and_the_same_command_goes_on(store, without_room, tmp_path, monkeypatch):
    library, full = without_room
    monkeypatch.chdir(library)  # python -c looks there first
    out, environment = tmp_path / "sweep", {"PYTHONPATH": str(library)}
    settings = [*TINY[1::2], "steps=8", "checkpoint_every=4", "validate_every=4"]
    names = ",".join(FAULTS)
    output, _ = sweep_process(store, out, names, settings, environment).communicate(timeout=200)
    assert "Traceback" not in output, output
    for name in FAULTS:
        status = read(run_of(out, name) / "status.json")
        assert status["state"] == "interrupted" and "same command" in status["error"], (name, status)
        left = [path for path in run_of(out, name).rglob("*") if path.name.endswith((".partial", ".old"))]
        assert not left
    assert "No space left on device" in read(run_of(out, "H1") / "status.json")["error"]
    assert "memory ran out" in read(run_of(out, "H6") / "status.json")["error"]
    full.unlink()
    finished(sweep_process(store, out, names, settings, environment))
    assert {state_of(run_of(out, name)) for name in FAULTS} == {"done"}
    assert len(locks_of(run_of(out, "H1"))) == 2, "it was begun again more often than the command was given"


# Start-up


@pytest.mark.parametrize(
    "command",
    [
        ["pack", "synthetic", "--count", 3, "--size", 36, "--out", "OUT"],
        ["train", "--hypothesis", "H3", "--data", "STORE", "--out", "OUT"],
        ["ablate", "--hypotheses", "H3", "--data", "STORE", "--out", "OUT"],
        ["parse-masks", "--images", "IMAGES", "--out", "OUT"],
        ["reconstruct", "drawn-faces", "IMAGES", "--no-align", "--out", "OUT"],
        [
            "interpolate",
            "drawn-faces",
            "IMAGES/a.png",
            "IMAGES/a.png",
            "--no-align",
            "--steps",
            2,
            "--out",
            "OUT.gif",
        ],
        ["bench", "--only", "drawing", "--seconds", 0, "--out", "OUT.json"],
        ["status", "OUT"],
        ["report", "OUT"],
        ["verify", "OUT"],
    ],
    ids=lambda command: command[0],
)
def test_a_place_that_cannot_be_used_is_one_sentence(store, tmp_path, command):
    from PIL import Image

    (tmp_path / "images").mkdir()
    Image.new("RGB", (72, 72)).save(tmp_path / "images" / "a.png")
    file = tmp_path / "file"
    file.write_text("not a directory")
    words = [str(part) for part in command]
    words = [word.replace("OUT", str(file / "below" / "x")).replace("STORE", str(store)) for word in words]
    done = facevae_here(*(word.replace("IMAGES", str(tmp_path / "images")) for word in words))
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].startswith("facevae: ") and str(file) in done.stderr
    assert file.read_text() == "not a directory"


@pytest.mark.parametrize("value", ["soon", "nan", "-1", "0"])
def test_bad_values_of_our_variables_are_one_sentence(store, tmp_path, monkeypatch, value):
    monkeypatch.setenv("FACEVAE_HEARTBEAT", value)
    for command in (["train", "--hypothesis", "H3"], ["ablate", "--hypotheses", "H3"]):
        done = facevae_here(*command, "--data", store, "--out", tmp_path / "out", *QUICK)
        assert done.returncode == 1 and "FACEVAE_HEARTBEAT" in done.stderr and done.stderr.count("\n") == 1
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device", "x"), MemoryError(), OSError(5, "I/O", "x")]
)
def test_what_lies_around_is_one_sentence_in_any_command(monkeypatch, tmp_path, error):
    import facevae.data.store

    def fail(*_):
        raise error

    monkeypatch.setattr(facevae.data.store.FaceStore, "__init__", fail)
    done = facevae_here("verify", tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("facevae: ") and done.stderr.count("\n") == 1
