"""Whatever dies, freezes or breaks while a sweep runs, it completes.

Its results are those of an undisturbed one, bit for bit.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
from conftest import facevae_here
from faults import (
    COMMAND,
    SETTINGS,
    all_gone,
    differences,
    finished,
    kernel_of,
    kill,
    listening,
    locks_of,
    read,
    run_of,
    state_of,
    step_of,
    sweep_process,
    tree,
    wait_until,
)

HYPOTHESES = ("H5", "H9")
FAST_BEATS = {"FACEVAE_HEARTBEAT": "1"}


# Its kernels train a network; the other tests of starting, watching and ending runs do with a stand-in.
TRAINS = "test_kernels_killed_at_random_steps[2]"


def completed(store, out):
    assert "FAILED []" in finished(sweep_process(store, out / "sweep", ",".join(HYPOTHESES)))


@pytest.fixture(scope="session")
def undisturbed(store, shared):
    return shared("undisturbed-sweep", lambda folder: completed(store, folder)) / "sweep"


@pytest.fixture
def same(request, store, shared, tally, monkeypatch):
    """Asserts that a sweep has completed and ended as the undisturbed one, and counts it."""
    if request.node.name == TRAINS:
        expected = request.getfixturevalue("undisturbed")
    else:
        library = request.getfixturevalue("stand_in")
        monkeypatch.setenv("PYTHONPATH", str(library))
        monkeypatch.chdir(library)  # python -c looks there first
        expected = shared("undisturbed-stand-in", lambda folder: completed(store, folder)) / "sweep"

    def check(out, faults, metrics=True):
        done = [name for name in HYPOTHESES if state_of(run_of(out, name)) == "done"]
        found = [
            line for name in done for line in differences(run_of(out, name), run_of(expected, name), metrics)
        ]
        tally(faults=faults, runs=len(done), differences=len(found))
        assert done == list(HYPOTHESES) and not found, found

    return check


def middle(out, hypothesis="H5", low=6):
    """Whether a run is in the middle of its training: its kernel's process, or None."""
    run = run_of(out, hypothesis)
    return kernel_of(run) if state_of(run) == "running" and low <= step_of(run) < 36 else None


def any_trains(out, low):
    """Whether some run has got to a step and is alive."""
    runs = [run_of(out, name) for name in HYPOTHESES]
    return any(step_of(run) >= low and kernel_of(run) for run in runs)


def parent_of(kernel: int) -> int:
    """The process that executes the notebook of a kernel, below the command."""
    parent = psutil.Process(kernel).parent()
    assert "facevae.sweep.runner" in " ".join(parent.cmdline()), parent
    return parent.pid


@pytest.mark.parametrize("kills", [2, 5])
def test_kernels_killed_at_random_steps(store, tmp_path, same, kills):
    out, generator, killed = tmp_path / "sweep", random.Random(0), []
    process = sweep_process(store, out, ",".join(HYPOTHESES))
    moments = {name: sorted(generator.sample(range(1, 37), kills)) for name in HYPOTHESES}
    planned = [(name, moment) for name in HYPOTHESES for moment in moments[name]]

    def killer():
        while planned and process.poll() is None:
            for name, moment in planned:
                pid = kernel_of(run_of(out, name))
                if pid and pid not in killed and step_of(run_of(out, name)) >= moment and kill(pid):
                    killed.append(pid)
                    planned.remove((name, moment))
                    break
            time.sleep(0.003)

    threading.Thread(target=killer, daemon=True).start()
    output = finished(process)
    assert len(killed) == kills * len(HYPOTHESES), f"only {len(killed)} kernels could be killed in time"
    assert "FAILED []" in output and output.count("It is begun again from step") == len(killed)
    assert sum(len(locks_of(run_of(out, name))) for name in HYPOTHESES) == len(HYPOTHESES) + len(killed)
    same(out, faults=len(killed))


def test_a_process_is_killed(store, tmp_path, same):
    """Not the kernel but its parent, which executes the notebook."""
    out = tmp_path / "sweep"
    process = sweep_process(store, out, ",".join(HYPOTHESES))
    kernels, left = [], set(HYPOTHESES)
    while left:
        name = wait_until(
            lambda: next((name for name in left if middle(out, name)), None), "a run trains", process=process
        )
        kernels.append(kernel_of(run_of(out, name)))
        kill(parent_of(kernels[-1]))
        left.remove(name)
    output = finished(process)
    assert output.count("The process that ran the notebook was ended by signal 9.") == 2, output
    assert output.count("It is begun again from step") == 2, output
    assert not any(psutil.pid_exists(kernel) for kernel in kernels), "a kernel outlived its parent"
    same(out, faults=2)


def test_the_whole_command_is_killed(store, tmp_path, same):
    out = tmp_path / "sweep"
    faults = 0
    for moment in (3, 30):
        process = sweep_process(store, out, ",".join(HYPOTHESES))
        wait_until(partial(any_trains, out, moment), "training", process=process)
        family = tree(process.pid)
        process.kill()
        process.wait()
        faults += 1
        if moment == 30:
            assert not all_gone(family), "something outlived the command"
            status = facevae_here("status", out).stdout
            # On a busy machine both may have ended their training before the command dies.
            assert ("lost" in status or "trained" in status) and "running" not in status, status
    finished(
        sweep_process(store, out, ",".join(HYPOTHESES))
    )  # the second kill's orphans were waited for, the first one's were not
    same(out, faults)


def test_processes_freeze(store, tmp_path, same):
    """Nothing dies, nothing answers: of one run process and kernel, of another the kernel alone.

    A stale heartbeat is enough.
    """
    out = tmp_path / "sweep"
    process = sweep_process(store, out, ",".join(HYPOTHESES), environment=FAST_BEATS)
    frozen, left = [], set(HYPOTHESES)
    while left:
        name = wait_until(
            lambda: next((name for name in left if middle(out, name)), None), "a run trains", process=process
        )
        frozen.append(kernel_of(run_of(out, name)))
        if name == "H5":
            frozen.append(parent_of(frozen[-1]))
        for pid in frozen:
            kill(pid, signal.SIGSTOP)
        left.remove(name)
    output = finished(process)
    for pid in frozen:
        kill(pid, signal.SIGCONT)
    assert "has not given a heartbeat for" in output and output.count("It is begun again from step") == 2, (
        output
    )
    assert [len(locks_of(run_of(out, name))) for name in HYPOTHESES] == [2, 2]
    same(out, faults=2)


def test_two_commands_on_one_sweep(store, tmp_path, same, tally):
    out = tmp_path / "sweep"
    both = [sweep_process(store, out, ",".join(HYPOTHESES)) for _ in range(2)]
    outputs = [finished(process) for process in both]
    executions = {name: len(locks_of(run_of(out, name))) for name in HYPOTHESES}
    assert executions == dict.fromkeys(HYPOTHESES, 1), f"a run was executed twice: {executions}"
    assert all(output.count(": done") == len(HYPOTHESES) for output in outputs), outputs
    assert sum(output.count("by another command") for output in outputs) == len(HYPOTHESES)
    same(out, faults=1)


def test_one_hypothesis_is_not_finite_and_one_notebook_raises(store, undisturbed, tmp_path, tally):
    out = tmp_path / "sweep"
    (run_of(out, "H9") / "metrics.parquet").mkdir(parents=True)  # in the way of what the evaluation writes
    settings = [*SETTINGS, 'weights={"l1":1e39}']
    output = finished(sweep_process(store, out, "H3,H5,H9", settings))
    assert "FAILED ['H3 seed 0', 'H9 seed 0']" in output, output
    bad, raised = (read(run_of(out, name) / "status.json") for name in ("H3", "H9"))
    assert bad["state"] == "failed" and "'l1' was not finite" in bad["error"] and "(Training)" in bad["cell"]
    assert (
        raised["state"] == "failed"
        and "Is a directory" in raised["error"]
        and "(Evaluation on the test faces)" in raised["cell"]
    )
    shown = facevae_here("status", out).stdout
    assert "1 done" in shown and "2 failed" in shown and raised["error"] in shown

    again = finished(sweep_process(store, out, "H3,H5,H9", settings))
    assert "H9 seed 0: failed before and is left alone" in again and len(locks_of(run_of(out, "H9"))) == 1
    (run_of(out, "H9") / "metrics.parquet").rmdir()
    retried = finished(sweep_process(store, out, "H3,H5,H9", settings, retry_failed=True))
    assert "FAILED ['H3 seed 0']" in retried and [
        len(locks_of(run_of(out, name))) for name in ("H3", "H5", "H9")
    ] == [2, 1, 2]
    found = [
        line for name in HYPOTHESES for line in differences(run_of(out, name), run_of(undisturbed, name))
    ]
    tally(faults=2, runs=2, differences=len(found))
    assert not found


def test_interrupted_by_ctrl_c(store, tmp_path, same):
    """A terminal sends Ctrl-C to every process of the group.

    Until then nothing listened to other machines.
    """
    out = tmp_path / "sweep"
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    arguments = [COMMAND, "ablate", "--data", store, "--out", out, "--hypotheses", ",".join(HYPOTHESES)]
    arguments += ["--workers", "2", *settings]
    process = subprocess.Popen(
        list(map(str, arguments)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_until(lambda: middle(out, low=3), "H5 trains", process=process)
    family = tree(process.pid)
    assert not listening(family[:1]), "the command listens on a port"
    # A kernel's debugger does, on this machine only.
    assert set(listening(family)) <= {"127.0.0.1"}, "something listens on another address than 127.0.0.1"
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=200)
    assert (
        process.returncode == 130
        and "facevae: interrupted. The same command goes on where it stopped." in errors
    )
    assert "Traceback" not in output + errors and "2 workers of this machine." in output
    assert not all_gone(family), "something outlived the command"
    assert (
        "interrupted"
        in {state_of(run_of(out, name)) for name in HYPOTHESES}
        <= {"interrupted", "pending", "done"}
    )
    assert not list(Path(out).glob(".s*-*")), "a marker file is left behind"
    finished(sweep_process(store, out, ",".join(HYPOTHESES)))
    same(out, faults=1)


@pytest.fixture
def cluster(tmp_path):
    """A running Dask cluster, as a lab has one: starts workers, and gives the scheduler file."""
    file, processes = tmp_path / "scheduler.json", []
    dask = [sys.executable, "-m", "dask"]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    addresses = ["--host", "127.0.0.1", "--port", "0", "--dashboard-address", "127.0.0.1:0"]
    scheduler = [*dask, "scheduler", *addresses, "--scheduler-file", str(file)]
    processes.append(subprocess.Popen(scheduler, **quiet))

    def worker(environment=None, threads=1):
        wait_until(lambda: read(file), "the scheduler")
        options = ["--nthreads", str(threads), "--host", "127.0.0.1", "--memory-limit", "0"]
        options += ["--scheduler-file", str(file), "--local-directory", str(tmp_path / "dask")]
        variables = os.environ | (environment or {})
        processes.append(subprocess.Popen([*dask, "worker", *options], env=variables, cwd=tmp_path, **quiet))
        return processes[-1]

    worker.file = str(file)
    yield worker
    for process in [
        one for parent in processes if parent.poll() is None for one in reversed(tree(parent.pid))
    ]:
        kill(process.pid)


def test_a_cluster_loses_a_machine_and_gets_another(store, tmp_path, same, cluster):
    """Worker and nanny are killed together, as when a machine goes.

    The only other one has several threads and still runs one at a time.
    """
    out = tmp_path / "sweep"
    first = cluster(threads=1)
    process = sweep_process(store, out, ",".join(HYPOTHESES), scheduler_file=cluster.file, workers=None)
    wait_until(lambda: middle(out), "H5 trains", process=process)
    victims = tree(first.pid)
    for victim in victims:
        with contextlib.suppress(psutil.Error):  # one that has ended meanwhile
            if "multiprocessing" in " ".join(victim.cmdline()) or victim.pid == first.pid:
                kill(victim.pid)
    first.wait()
    cluster(threads=4)
    most = 0
    while process.poll() is None:
        most = max(most, sum(kernel_of(run_of(out, name)) is not None for name in HYPOTHESES))
        time.sleep(0.05)
    output = finished(process)
    assert "1 worker at tcp://127.0.0.1" in output and "Its worker is gone" in output and most == 1, output
    same(out, faults=1, metrics=False)  # the evaluation had four threads


@pytest.mark.slow
def test_a_worker_of_a_cluster_freezes(store, tmp_path, same, monkeypatch, request):
    """Dask does not hear of it any more, and after the scheduler's worker-ttl it counts as gone."""
    monkeypatch.setenv("DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL", "20 seconds")
    monkeypatch.setenv("FACEVAE_HEARTBEAT", "1")
    cluster = request.getfixturevalue("cluster")
    for _ in HYPOTHESES:
        cluster()
    out = tmp_path / "sweep"
    process = sweep_process(store, out, ",".join(HYPOTHESES), scheduler_file=cluster.file, workers=None)
    kernel = wait_until(lambda: middle(out), "H5 trains", process=process)
    frozen = [kernel, parent_of(kernel), locks_of(run_of(out, "H5"))[-1]["process"]["pid"]]
    for pid in frozen:
        kill(pid, signal.SIGSTOP)
    output = finished(process)
    for pid in frozen:
        kill(pid, signal.SIGCONT)
    assert "H5 seed 0: Its worker is gone. It is begun again from step" in output, output
    same(out, faults=1)


def test_a_worker_that_cannot_do_the_work_is_named(store, tmp_path, cluster, tally):
    other = tmp_path / "other"
    shutil.copytree(
        Path(sys.modules["facevae"].__file__).parent
        if "facevae" in sys.modules
        else Path(__file__).parent.parent / "facevae",
        other / "facevae",
    )
    with open(other / "facevae" / "model" / "losses.py", "a") as file:
        file.write("\nCHANGED = True\n")
    cluster()
    cluster({"PYTHONPATH": str(other)})
    out = tmp_path / "sweep"
    wait_until(lambda: read(Path(cluster.file)), "the scheduler")
    from distributed import Client

    with Client(scheduler_file=cluster.file) as client:
        client.wait_for_workers(2)
    process = sweep_process(store, out, "H5", scheduler_file=cluster.file)
    output, _ = process.communicate(timeout=200)
    assert (
        process.returncode == 1 and "has other code of facevae" in output and "Nothing was started" in output
    ), output
    assert "127.0.0.1" in output and "Traceback" not in output and not locks_of(run_of(out, "H5"))
    tally(faults=1)
