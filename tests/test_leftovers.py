"""Whatever is killed or cut short: nothing is lost, nothing blocks, and nothing is left lying about."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
from conftest import facevae_here

from facevae import atomic_io
from facevae.atomic_io import (
    atomic_directory,
    atomic_file,
    private_directory,
    remove_leftovers,
    restore_directory,
    write_text,
)
from facevae.core import FaceVAEError
from facevae.training.lock import LockBusy, acquire, is_locked, newest_lock


def forked(function) -> int:
    """Run a function in a process of its own, as a new command; its exit code, negative for a signal."""
    pid = os.fork()
    if not pid:
        atomic_io._CLEARED.clear()
        try:
            function()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed(function, name: str, when) -> None:
    """Run a function in a process that is killed when it calls `os.NAME` with arguments for which `when`."""
    real = getattr(os, name)

    def die(*arguments, **options):
        if when(*arguments):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)

    def run():
        setattr(os, name, die)
        function()

    assert forked(run) == -signal.SIGKILL, f"{name} is never called so"


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def fill(path: Path, text: str) -> None:
    with atomic_directory(path, overwrite=True) as folder:
        (folder / "a").write_text(text)


MOMENTS = {
    "it begins": ("mkdir", lambda path, *_: Path(path).name == "new"),
    "it is flushed": ("fsync", lambda *_: True),
    "the old one is moved aside": ("replace", lambda old, new: Path(old).name in ("model", "store")),
    "the new one gets its name": (
        "replace",
        lambda old, new: Path(old).name == "new" and Path(new).name in ("model", "store"),
    ),
    "the old one is removed": ("unlink", lambda name, *_: name == "a"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_replaced_directory_is_whole_whenever_its_process_is_killed(tmp_path, moment):
    path = tmp_path / "model"
    fill(path, "old")
    killed(lambda: fill(path, "new"), *MOMENTS[moment])
    restore_directory(path)
    assert (path / "a").read_text() == ("new" if moment.endswith("removed") else "old")
    assert forked(lambda: fill(path, "newer")) == 0 and (path / "a").read_text() == "newer"
    assert names(tmp_path) == ["model"], "what was left is gone"


def test_a_store_comes_back_that_was_just_being_replaced(tmp_path):
    out = tmp_path / "store"
    again = ("pack", "synthetic", "--count", 20, "--size", 36, "--out", out, "--overwrite")
    assert facevae_here(*again[:-1]).returncode == 0
    digest = (out / "manifest.json").read_bytes()
    killed(lambda: facevae_here(*again[:3], 21, *again[4:]), *MOMENTS["the new one gets its name"])
    assert not out.exists()
    assert facevae_here("verify", out).returncode == 0 and (out / "manifest.json").read_bytes() == digest
    assert facevae_here(*again).returncode == 0 and names(tmp_path) == ["store"]


def test_what_cannot_be_put_back_is_named(tmp_path):
    path = tmp_path / "store"
    fill(path, "old")
    killed(lambda: fill(path, "new"), *MOMENTS["the new one gets its name"])
    with mock.patch.object(atomic_io.os, "replace", side_effect=PermissionError(13, "Permission denied")):
        shown = facevae_here("verify", path)
    assert shown.returncode == 1 and "move it back" in shown.stderr
    aside = Path(shown.stderr.split("lies in '")[1].split("'")[0])
    assert (aside / "a").read_text() == "old"


@contextmanager
def living(function):
    """A process that is in the middle of something until the block ends."""
    ready, say = os.pipe()
    pid = os.fork()
    if not pid:
        with function() as place:
            os.write(say, str(place).encode())
            time.sleep(60)
            os._exit(1)
    try:
        yield Path(os.read(ready, 1000).decode())
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_leftovers_go_and_what_lives_stays(tmp_path, monkeypatch):
    """Of files, directories and temporary files, as soon as their process is dead, and not before."""
    monkeypatch.setattr(atomic_io.tempfile, "tempdir", str(tmp_path))
    makers = [
        lambda: atomic_file(tmp_path / "status.json"),
        lambda: atomic_directory(tmp_path / "store"),
        private_directory,
    ]

    def next_command():
        write_text(tmp_path / "other.txt", "")
        with private_directory():
            pass

    for make in makers:
        with living(make) as place:
            assert forked(next_command) == 0
            assert place.exists(), "it is at work"
        assert len(names(tmp_path)) == 2, "it was killed"
        assert forked(next_command) == 0
        assert names(tmp_path) == ["other.txt"]


def test_only_leftovers_are_removed(tmp_path, monkeypatch):
    """What looks like one and is not, and what another machine may be working on."""
    monkeypatch.setattr(atomic_io.tempfile, "tempdir", str(tmp_path))
    for name in ("facevae-notes", ".film.partial", ".x.0a1b2c3d.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "lock").write_text(atomic_io.machine_id())
    (tmp_path / ".link.0a1b2c3d.partial").symlink_to("elsewhere")
    (tmp_path / "facevae-link").symlink_to("elsewhere")
    there = tmp_path / ".status.json.0a1b2c3d.partial"
    there.mkdir()
    (there / "lock").write_text("another machine")
    before = names(tmp_path)
    for _ in range(2):
        remove_leftovers(tmp_path / "status.json")
        with private_directory():
            pass
    assert names(tmp_path) == before and (tmp_path / "elsewhere" / "lock").exists()
    yesterday = time.time() - 2 * 86400
    os.utime(there / "lock", (yesterday, yesterday))
    remove_leftovers(tmp_path / "status.json")
    assert names(tmp_path) == [name for name in before if name != there.name]


GONE = {"pid": 2**22 - 1, "created": 1.0}
BROKEN = {
    "empty": b"",
    "cut short": b'{"host": "atlas", "machi',
    "no JSON": b"\xff\xfe\0lock",
    "no object": b"[1, 2]",
    "foreign": b'{"locked": true}',
    "other types": json.dumps({"machine": 7, "process": "me", "every": "often", "ended": None}).encode(),
    "no directory entry": None,
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("age", [0, 10**9, -(10**9)], ids=["fresh", "old", "of the future"])
def test_a_broken_lock_file_of_a_dead_process_blocks_nobody(tmp_path, monkeypatch, content, age):
    monkeypatch.setenv("FACEVAE_HEARTBEAT", "0.05")
    file = tmp_path / "claims" / "000007.json"
    file.parent.mkdir()
    file.mkdir() if content is None else file.write_bytes(content)
    os.utime(file, (time.time() - age,) * 2)
    assert not is_locked(tmp_path)
    with pytest.warns(UserWarning, match="000007.json' does not say"), acquire(tmp_path) as lock:
        assert lock.number == 8 and is_locked(tmp_path)


@pytest.mark.parametrize("every", [0, -1, 1e-9, 1e15, 10**40])
def test_a_lock_file_with_odd_numbers_blocks_nobody(tmp_path, monkeypatch, every):
    monkeypatch.setenv("FACEVAE_HEARTBEAT", "0.05")
    file = tmp_path / "claims" / "000001.json"
    file.parent.mkdir()
    content = {"host": "x", "machine": atomic_io.machine_id(), "process": GONE, "every": every}
    file.write_text(json.dumps(content))
    with acquire(tmp_path) as lock:
        assert lock.number == 2


def test_numbers_of_locks_go_on_beyond_six_digits(tmp_path):
    (tmp_path / "claims").mkdir()
    ended = {"machine": "x", "process": GONE, "ended": 1.0}
    (tmp_path / "claims" / "999999.json").write_text(json.dumps(ended))
    with acquire(tmp_path):
        assert newest_lock(tmp_path)[0] == 1_000_000
        with pytest.raises(LockBusy):
            acquire(tmp_path)


def test_a_broken_lock_file_of_a_living_process_still_locks(tmp_path, monkeypatch):
    monkeypatch.setenv("FACEVAE_HEARTBEAT", "0.05")
    code = f"import time; from facevae.training.lock import acquire; lock = acquire({str(tmp_path)!r}); \
print('locked', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "locked\n"
        holder.send_signal(signal.SIGSTOP)
        (tmp_path / "claims" / "000001.json").write_text("")
        with pytest.raises(LockBusy):
            acquire(tmp_path)
        assert holder.poll() is None
    finally:
        holder.kill()
        holder.wait()


def test_a_run_goes_on_with_what_a_killed_one_has_left(tmp_path):
    """What lies half-written goes, whoever made it; what was moved aside comes back."""
    for name in (".status.json.0a1b2c3d.partial", ".step.safetensors.abcdefgh.partial"):
        write_text(tmp_path / name / "new", "half")
    write_text(tmp_path / ".status.json.4711.partial", "{")
    write_text(tmp_path / ".model.abcd1234.old" / "model" / "config.json", "{}")
    (tmp_path / ".link.partial").symlink_to(tmp_path / "model")
    with acquire(tmp_path):
        assert names(tmp_path) == [".lock", "claims", "model"] and names(tmp_path / "model") == [
            "config.json"
        ]


@pytest.fixture
def events(monkeypatch):
    """What is flushed ("sync", path) and named ("name", path), in order; links and descriptors resolved."""
    seen, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (seen.append(("sync", _path_of(file))), fsync(file))[-1])
    monkeypatch.setattr(
        os, "replace", lambda old, new: (seen.append(("name", str(old), str(new))), replace(old, new))[-1]
    )
    return seen


def _path_of(file) -> str:
    handle = file if isinstance(file, int) else file.fileno()
    return os.readlink(f"/proc/self/fd/{handle}")


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/fd").exists(), reason="which file is open is read in /proc"
)


@needs_proc
def test_what_is_said_to_be_saved_is_on_the_disk(store, tmp_path, events):
    """Content before name, name before the next step, and the log before the checkpoint that counts on it."""
    from facevae.config import make_config
    from facevae.training.trainer import train

    small = dict(
        width=0.1, latent_dim=8, batch_size=8, steps=4, checkpoint_every=2, validate_every=2, threads=1
    )
    run = tmp_path.resolve() / "run"
    train(make_config("H3", "quick", 0, small | dict(log_every=1, val_images=8)), store, run, progress=False)
    renames = [(at, event[1], event[2]) for at, event in enumerate(events) if event[0] == "name"]
    assert {Path(new).name for _, _, new in renames} >= {
        "config.json",
        "status.json",
        "best.safetensors",
        "model",
    }
    for at, old, new in renames:
        assert ("sync", old) in events[:at], f"the content of {new}"
        assert ("sync", str(Path(new).parent)) in events[at:], f"the name of {new}"
    logged = 0
    for at, _, new in renames:
        if Path(new).name.startswith("step-"):
            assert ("sync", str(run / "log.jsonl")) in events[logged:at]
            logged = at
    assert logged
    weights = [path for kind, path, *_ in events if kind == "sync" and "/new/model.safetensors" in path]
    assert weights, "what is in a directory, too"


def test_nothing_is_left_where_writing_fails(tmp_path):
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt(), FaceVAEError("no")):
        for make in (atomic_file, atomic_directory):
            with pytest.raises(type(error)), make(tmp_path / "a"):
                raise error
    with pytest.raises(FileExistsError), atomic_file(write_text(tmp_path / "a", "1"), overwrite=False):
        pass
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "1"
