"""What other users of the machine, and files of strangers, can do while facevae is at work: nothing."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from conftest import ROOT, contents, facevae_here
from faults import listening, tree
from PIL import Image

from facevae.atomic_io import atomic_directory, atomic_file, file_lock, machine_id, write_text
from facevae.config import make_config
from facevae.core import FaceVAEError
from facevae.system import current_process, is_alive
from facevae.training.lock import LockBusy, acquire
from facevae.training.run import RunDirectory, write_pending

COMMAND = Path(sys.executable).parent / "facevae"
SMALL = dict(width=0.1, latent_dim=8, batch_size=8, steps=2, validate_every=2, checkpoint_every=2, threads=1)
SMALL |= dict(log_every=1, val_images=8, test_images=8)


def train_and_evaluate(store, run) -> None:
    from facevae.training.evaluation import evaluate_run
    from facevae.training.trainer import train

    train(make_config("H3", "quick", 0, SMALL), store, run, progress=False)
    evaluate_run(run, store)


@contextmanager
def command(cwd, *arguments, **variables):
    """A facevae command at work; its process, and what it has printed so far. Ended like by Ctrl-C."""
    environment = os.environ | variables
    process = subprocess.Popen(
        [COMMAND, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        cwd=cwd,
    )
    os.set_blocking(process.stdout.fileno(), False)
    said = []

    def output() -> str:
        said.append(process.stdout.read() or b"")
        return b"".join(said).decode()

    try:
        yield SimpleNamespace(process=process, output=output)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        finally:
            process.kill()


def wait_until(condition, at_work=None, seconds: float = 120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end and (at_work is None or at_work.process.poll() is None), (
            at_work.output() if at_work else "too late"
        )
        time.sleep(0.05)


# Ports


def test_a_sweep_on_one_machine_opens_no_port(store, stand_in, tmp_path):
    """Not in the command, nor in the processes of its runs, nor in their kernels."""
    sweep_of = (
        "ablate",
        "--data",
        store,
        "--out",
        tmp_path / "sweep",
        "--hypotheses",
        "H3,H5",
        "--workers",
        2,
    )
    settings = ("--set", "steps=100", "--set", "log_every=1", "--set", "checkpoint_every=5")
    with command(tmp_path, *sweep_of, *settings, PYTHONPATH=str(stand_in)) as sweep:
        runs = [RunDirectory(tmp_path / "sweep" / name / "seed0") for name in ("H3", "H5")]
        wait_until(lambda: all(run.status.get("step", 0) > 2 for run in runs), sweep)
        members = tree(sweep.process.pid)
        kernels = [member for member in members if any("ipykernel" in word for word in member.cmdline())]
        assert len(kernels) == 2 and not listening(members)
        for kernel in kernels:
            file = next(Path(word) for word in kernel.cmdline() if word.endswith(".json"))
            assert stat.S_IMODE(file.stat().st_mode) == 0o600
            sockets = json.loads(file.read_text())
            assert sockets["transport"] == "ipc"
            assert stat.S_IMODE(Path(sockets["ip"]).parent.stat().st_mode) == 0o700
        assert "http" not in sweep.output()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """Two certificates, each its own authority: {name: {"ca", "cert", "key"}}."""
    if not shutil.which("openssl"):
        pytest.skip("certificates are made by openssl, which is not installed")
    folder, made = tmp_path_factory.mktemp("certificates"), {}
    for name in ("ours", "theirs"):
        key, certificate = folder / f"{name}.key", folder / f"{name}.crt"
        options = ["-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}"]
        subprocess.run(
            ["openssl", "req", "-x509", *options, "-keyout", key, "-out", certificate],
            check=True,
            capture_output=True,
        )
        made[name] = {"ca": certificate, "cert": certificate, "key": key}
    return made


@contextmanager
def cluster(tls=None):
    """A Dask scheduler with a worker, in this process; with certificates when these are given."""
    from distributed import LocalCluster, Security

    options = {"protocol": "tcp"}
    if tls:
        files = {"tls_ca_file": str(tls["ca"])}
        for role in ("client", "scheduler", "worker"):
            files |= {f"tls_{role}_cert": str(tls["cert"]), f"tls_{role}_key": str(tls["key"])}
        options = {"protocol": "tls", "security": Security(require_encryption=True, **files)}
    with LocalCluster(
        n_workers=1,
        threads_per_worker=1,
        processes=False,
        dashboard_address=None,
        host="127.0.0.1",
        **options,
    ) as made:
        yield made.scheduler_address


def test_a_cluster_with_certificates(store, tmp_path, certificates):
    """It is used with its own, and with none or others nothing is done there."""
    from facevae.sweep.cluster import ClusterWorkerPool, existing_cluster

    ours, theirs = certificates["ours"], certificates["theirs"]
    with cluster(ours) as address:
        assert address.startswith("tls://")
        with (
            existing_cluster(address, tls=ours) as client,
            ClusterWorkerPool(client, store, tmp_path) as pool,
        ):
            pool.wait_until_ready()
            assert str(pool) == f"1 worker at {address}."
        assert not list(tmp_path.iterdir()), "no marker is left"
        for wrong in ({}, theirs, {"ca": ours["ca"], "cert": theirs["cert"], "key": theirs["key"]}):
            with (
                pytest.raises(FaceVAEError, match="No Dask scheduler answers"),
                existing_cluster(address, tls=wrong),
            ):
                pass
    for wrong in ({"ca": ours["ca"]}, ours | {"key": tmp_path / "nowhere"}):
        with pytest.raises(FaceVAEError, match="--tls-"), existing_cluster(address, tls=wrong):
            pass


def test_a_cluster_without_certificates_is_named_one(store, tmp_path, certificates):
    from facevae.sweep.cluster import ClusterWorkerPool, existing_cluster

    with cluster() as address:
        with existing_cluster(address) as client, ClusterWorkerPool(client, store, tmp_path) as pool:
            pool.wait_until_ready()
            assert "no certificates: whoever reaches that port can run code as you" in str(pool)
        with (
            pytest.raises(FaceVAEError, match="No Dask scheduler answers"),
            existing_cluster(address, tls=certificates["ours"]),
        ):
            pass
    refused = facevae_here("ablate", "--data", store, "--out", tmp_path / "s", "--tls-ca", "a.crt")
    assert refused.returncode == 1 and "are for a cluster" in refused.stderr and not (tmp_path / "s").exists()


# Secrets


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="command lines are read in /proc")
def test_the_token_is_in_no_command_line(tmp_path):
    """Nor in a file that others can read; and the browser gets to the page all the same."""
    pytest.importorskip("voila", reason="voila is not installed: pip install facevae[explore]")
    browser = write_text(
        tmp_path / "browser", '#!/bin/sh\necho "$1" > "$OPENED.new"\nmv "$OPENED.new" "$OPENED"\nsleep 20\n'
    )
    browser.chmod(0o755)
    opened, temporary = tmp_path / "opened", tmp_path / "tmp"
    temporary.mkdir()
    variables = dict(BROWSER=f"{browser} %s", OPENED=str(opened), TMPDIR=str(temporary))
    with command(tmp_path, "explore", "--port", "0", **variables) as explore:
        wait_until(opened.exists, explore)
        token = explore.output().split("token=")[1].split()[0]
        lines = b"".join(path.read_bytes() for path in _command_lines())
        assert str(browser).encode() in lines and token.encode() not in lines
        link = opened.read_text().strip()
        page = Path(link.removeprefix("file://"))
        assert token not in link and f"token={token}" in page.read_text()
        assert not any(path.stat().st_mode & 0o77 for path in (page, page.parent))
    assert not list(temporary.iterdir()), "it is gone with the server"


def _command_lines() -> list[Path]:
    return [path for path in Path("/proc").glob("[0-9]*/cmdline") if os.access(path, os.R_OK)]


# Links


@pytest.fixture(scope="module")
def finished(store, shared):
    """A sweep directory with one run that is done."""

    def make(folder):
        from facevae.sweep.plan import plan_sweep

        plan_sweep(store, folder / "sweep", ["H3"], overrides=SMALL)
        train_and_evaluate(store, folder / "sweep" / "H3" / "seed0")

    return shared("finished-sweep", make) / "sweep"


def replace_by_link(path: Path, target: Path) -> None:
    """Move what is there to another place, and leave a link to it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(path, target) if path.exists() else None
    path.symlink_to(target)


RUN_NAMES = ["", "claims", "claims/000001.json", "checkpoint", "checkpoint/best.safetensors", "config.json"]
RUN_NAMES += [
    "status.json",
    "log.jsonl",
    "samples",
    "samples.png",
    "model",
    "model/model.safetensors",
    ".lock",
]
RUN_NAMES += [
    "model/README.md",
    "metrics.parquet",
    "latents.parquet",
    "distances.parquet",
    "claims/000002.json",
    "claims/000003.json",
]


@pytest.mark.parametrize("name", RUN_NAMES)
def test_nothing_is_written_through_a_link_in_a_run(store, finished, tmp_path, monkeypatch, name):
    """Whatever of a stranger's run leads elsewhere: going on with it changes nothing there."""
    monkeypatch.setenv("FACEVAE_HEARTBEAT", "0.05")
    from facevae.sweep.plan import plan_sweep
    from facevae.sweep.runner import execute_run

    sweep = tmp_path / "sweep"
    shutil.copytree(finished, sweep)
    run = sweep / "H3" / "seed0"
    for old in run.glob("checkpoint/step-*"):
        old.unlink()
    fields = json.loads((run / "status.json").read_text())
    write_text(run / "status.json", json.dumps(fields | {"state": "interrupted"}))
    for number, one in enumerate(name.split(" ")):
        replace_by_link(run / one, tmp_path / "elsewhere" / str(number))
    before = contents(tmp_path / "elsewhere")
    try:
        plan_sweep(store, sweep, ["H3"], overrides=SMALL)
        write_pending(run, steps=2)
        train_and_evaluate(store, run)
    except FaceVAEError as error:
        assert "link" in str(error)
    assert contents(tmp_path / "elsewhere") == before
    if name in ("claims", ".lock"):
        assert execute_run(run, {}, {}).state == "failed"


@pytest.mark.parametrize("name", ["H3", ".lock", "sweep.json"])
def test_nothing_is_written_through_a_link_in_a_sweep(store, finished, tmp_path, name):
    from facevae.sweep.plan import plan_sweep

    shutil.copytree(finished, tmp_path / "sweep")
    (tmp_path / "sweep" / "H3" / "seed0" / "status.json").unlink()
    replace_by_link(tmp_path / "sweep" / name, tmp_path / "elsewhere" / "thing")
    before = contents(tmp_path / "elsewhere")
    try:
        plan_sweep(store, tmp_path / "sweep", ["H3"], seeds=[0, 1], overrides=SMALL)
    except FaceVAEError as error:
        assert "link" in str(error)
    assert contents(tmp_path / "elsewhere") == before


def test_names_of_partial_files_cannot_be_foreseen(tmp_path):
    """Links under all names that were used before lead nowhere now."""
    seen = []
    for _ in range(2):
        with atomic_file(tmp_path / "status.json") as partial:
            seen += [path.name for path in tmp_path.iterdir()]
            partial.write_text("{}")
    assert len(set(seen) - {"status.json"}) == 2
    victim = write_text(tmp_path / "precious", "years")
    for pid in range(os.getpid() - 5, os.getpid() + 5):
        (tmp_path / f".status.json.{pid}.partial").symlink_to(victim)
    (tmp_path / "status.json").unlink()
    write_pending(tmp_path, steps=1)
    assert victim.read_text() == "years" and json.loads((tmp_path / "status.json").read_text())["steps"] == 1


def test_no_lock_is_taken_through_a_link(tmp_path):
    for target in (tmp_path / "made", write_text(tmp_path / "there", "years")):
        (tmp_path / ".lock").symlink_to(target)
        with pytest.raises(FaceVAEError, match="it is a link"):
            file_lock(tmp_path / ".lock")
        (tmp_path / ".lock").unlink()
    assert not (tmp_path / "made").exists() and (tmp_path / "there").read_text() == "years"


# Processes


def described(pid: int) -> dict:
    return {"pid": pid, "created": psutil.Process(pid).create_time()}


@pytest.mark.parametrize("field", ["process", "kernel"])
@pytest.mark.parametrize("locked", [True, False])
def test_a_lock_file_kills_no_process_that_is_not_of_the_run(tmp_path, monkeypatch, field, locked):
    monkeypatch.setenv("FACEVAE_HEARTBEAT", "0.05")
    run = tmp_path / "run"
    (run / "claims").mkdir(parents=True)
    (run / ".lock").touch()
    # It even names the run in its command line, and has a file of it open.
    with open(write_text(run / "notes", "")) as notes:
        victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", run], stdin=notes)
    dead = {"pid": 2**22 - 1, "created": 1.0}
    content = {
        "host": "x",
        "machine": machine_id(),
        "process": dead,
        "every": 0.05,
        "ended": None,
        "since": 0,
    }
    file = write_text(run / "claims" / "000001.json", json.dumps(content | {field: described(victim.pid)}))
    os.utime(file, (1, 1))
    code = (
        "import fcntl, sys, time; f = open(sys.argv[1]); fcntl.flock(f, 2); print(flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, run / ".lock"]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE) if locked else None
    try:
        if holder:
            holder.stdout.readline()
            with pytest.raises(LockBusy):
                acquire(run)
        else:
            acquire(run).release()
        time.sleep(0.2)
        assert is_alive(described(victim.pid))
    finally:
        for process in filter(None, (victim, holder)):
            process.kill()
            process.wait()


@pytest.mark.parametrize("how", ["holds the lock", "inherits it"])
def test_a_frozen_process_of_the_run_is_killed(tmp_path, monkeypatch, how):
    monkeypatch.setenv("FACEVAE_HEARTBEAT", "0.05")
    code = (
        "import time; from facevae.training import lock; held = lock.{}; print(1, flush=True); time.sleep(60)"
    )
    call = f"acquire({str(tmp_path)!r})"
    environment, parent = dict(os.environ), None
    if how == "inherits it":
        parent = acquire(tmp_path)
        environment |= parent.environment
        call = f"inherit({str(tmp_path)!r})"
    frozen = subprocess.Popen(
        [sys.executable, "-c", code.format(call)], stdout=subprocess.PIPE, env=environment
    )
    try:
        assert frozen.stdout.readline() == b"1\n"
        frozen.send_signal(signal.SIGSTOP)
        if parent:  # as if it had been killed
            parent._released.set()
            parent.file_lock.release()
        time.sleep(1)  # more than twelve heartbeats
        with acquire(tmp_path) as lock:
            assert lock.number == 2 and lock.content["process"] == current_process()
        assert frozen.wait(5) == -signal.SIGKILL
    finally:
        frozen.kill()
        frozen.wait()


# Permissions


@pytest.fixture(params=[0o002, 0o027], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def wrong_modes(folder: Path, umask: int) -> dict[str, str]:
    paths = [path for path in folder.rglob("*") if not path.is_symlink()]
    expected = {path: (0o777 if path.is_dir() else 0o666) & ~umask for path in paths}
    found = {path: stat.S_IMODE(path.stat().st_mode) for path in paths}
    return {str(path): oct(mode) for path, mode in found.items() if mode != expected[path]}


def test_everything_has_the_permissions_that_the_umask_says(store, tmp_path, umask):
    """Of a run, a store, a model, and of what single functions write."""
    from facevae.editing.animation import save_gif
    from facevae.model.vae import FaceVAE
    from facevae.parsing.label_quality import write_labels
    from facevae.plotting import notice_figure, save_figure
    from facevae.sweep.plan import plan_sweep

    plan_sweep(store, tmp_path / "sweep", ["H3"], overrides=SMALL)
    train_and_evaluate(store, tmp_path / "sweep" / "H3" / "seed0")
    vae = FaceVAE.from_pretrained("drawn-faces")
    vae.save_pretrained(tmp_path / "model")
    assert (
        facevae_here("pack", "synthetic", "--count", 20, "--size", 36, "--out", tmp_path / "store").returncode
        == 0
    )
    save_figure(notice_figure("nothing"), tmp_path / "figures", "a")
    save_gif([Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")], tmp_path / "a.gif")
    write_labels(tmp_path / "labels", "a.jpg", np.zeros((8, 8), np.uint8))
    with file_lock(tmp_path / "some.lock"):
        pass
    assert len(list(tmp_path.rglob("*"))) > 30 and not wrong_modes(tmp_path, umask)


def test_a_library_that_makes_private_files_changes_nothing(tmp_path, umask):
    """As safetensors does, which puts a file of its own in the place of the one it is told to write."""

    def write(path):
        private = path.with_name("private")
        os.close(os.open(private, os.O_WRONLY | os.O_CREAT, 0o600))
        os.replace(private, path)

    with atomic_file(tmp_path / "a.onnx") as partial:
        write(partial)
    with atomic_directory(tmp_path / "model") as folder:
        (folder / "deeper").mkdir()
        write(folder / "a.safetensors")
        write(folder / "deeper" / "b.zip")
    assert len(list(tmp_path.rglob("*"))) == 5 and not wrong_modes(tmp_path, umask)


def test_weights_in_the_package_are_readable_by_everybody():
    files = [path for path in (ROOT / "facevae" / "models").rglob("*") if path.is_file()]
    assert files and all(path.stat().st_mode & 0o444 == 0o444 for path in files)
