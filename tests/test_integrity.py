"""Files that changed after they were written are named, and trouble in reading is never taken for damage."""

import builtins
import errno
import os
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, contents, facevae_here, let_manifest_agree

from facevae.analysis.claims import SweepAnalysis
from facevae.analysis.figures import study_figures
from facevae.analysis.report import render_markdown
from facevae.analysis.results import load_sweep
from facevae.config import parse_settings
from facevae.core import FaceVAEError, UnreadableFile
from facevae.data import digests
from facevae.data.loader import Batches
from facevae.data.packing import pack
from facevae.data.store import STORE_FILES, FaceStore
from facevae.editing.latent_space import read_directions
from facevae.model.vae import FaceVAE
from facevae.safe_io import read_object
from facevae.sweep.plan import plan_sweep, read_sweep
from facevae.sweep.scheduler import run_sweep
from facevae.synthetic.render import SyntheticSource
from facevae.training.checkpoint import load_checkpoint, save_checkpoint
from facevae.training.evaluation import evaluate_run
from facevae.training.files import RESULT_FILES
from facevae.training.optimizer import ClippedAdam
from facevae.training.run import RunDirectory, RunInterrupted, read_state, read_status
from facevae.training.trainer import train

SETTINGS = TINY[1::2]
TROUBLE = [errno.EIO, errno.EMFILE, errno.EACCES, errno.ESTALE, errno.ENOMEM, MemoryError]


def plan(made, **options):
    return plan_sweep(made / "store", made / "sweep", "H9", overrides=parse_settings(SETTINGS), **options)


@pytest.fixture(scope="session")
def originals(shared):
    """A store, and a sweep of one run, which is done."""

    def make(folder):
        pack(SyntheticSource(count=40, seed=1, size=36), folder / "store", progress=False)
        (spec,) = plan(folder)
        train(spec.config, folder / "store", spec.run.path, progress=False)
        evaluate_run(spec.run.path, folder / "store")

    return shared("integrity", make)


@pytest.fixture
def made(originals, tmp_path, monkeypatch):
    """A copy of the originals in the working directory, for which nothing is remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = SimpleNamespace(path=Path(shutil.copytree(originals, tmp_path / "made")))
    made.store, made.sweep = made.path / "store", made.path / "sweep"
    made.run = made.sweep / "H9" / "seed0"
    return made


def flip(path: Path, place: float) -> None:
    """Turn one bit of a file. place: from 0, the first byte, to 1, the last."""
    data = bytearray(path.read_bytes())
    position = round(place * (len(data) - 1))
    data[position] ^= 1 << position % 8
    path.write_bytes(data)


def refused(function, *arguments, **options) -> str:
    with pytest.raises(FaceVAEError) as caught:
        function(*arguments, **options)
    return str(caught.value)


# The store


@pytest.mark.parametrize("name", STORE_FILES)
def test_nothing_is_trained_or_evaluated_on_a_changed_store(made, name):
    flip(made.store / name, 0.6)
    before = contents(made.sweep)
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    for command in (
        ["train", "--hypothesis", "H3", "--out", made.path / "run"],
        ["ablate", "--out", made.sweep],
    ):
        done = facevae_here(*command, "--data", made.store, *settings)
        assert done.returncode == 1 and name in done.stderr and "checksum" in done.stderr
    assert name in refused(evaluate_run, made.run, made.store)
    assert name in refused(lambda: Batches(FaceStore(made.store), "test"))
    assert not (made.path / "run").exists()
    now = contents(made.sweep)
    assert {path: now[path] for path in before} == before and not set(now) - set(before) - {".lock"}


def test_no_bit_of_index_or_manifest_is_read_as_another(made):
    good = FaceStore(made.store)
    for name in ("index.parquet", "manifest.json"):
        whole = (made.store / name).read_bytes()
        for place in range(60):
            flip(made.store / name, place / 59)
            try:
                found = FaceStore(made.store)
                assert found.index.equals(good.index) and found.fingerprint == good.fingerprint, (name, place)
                assert found.manifest.source == good.manifest.source, (name, place)
            except FaceVAEError as error:
                assert name in str(error) or "store" in str(error)
            (made.store / name).write_bytes(whole)


def test_a_run_records_that_its_store_was_checked(made):
    status = read_status(made.run)
    assert status["store_checked"] <= status["updated"]
    assert read_object(made.run / "config.json")["data_fingerprint"] == FaceStore(made.store).fingerprint


def test_a_store_is_read_once_a_machine_until_it_changes(originals, tmp_path, monkeypatch):
    read = []

    def counted(path, progress=False):
        read.append(Path(path).name)
        return digest(path, progress)

    digest = digests.file_digest
    monkeypatch.setattr(digests, "file_digest", counted)
    monkeypatch.setattr(digests, "NOTED_BYTES", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    store = FaceStore(shutil.copytree(originals / "store", tmp_path / "store"))
    monkeypatch.setattr(digests.time, "time", lambda: os.stat(store.path / "images.npy").st_ctime + 60)
    for expected in (["images.npy", "index.parquet", "labels.npy"], [], []):
        read.clear()
        digests._DIGESTS.clear()  # as in another process
        store.check()
        assert sorted(read) == expected
    read.clear()
    shutil.copytree(store.path, tmp_path / "copy")
    FaceStore(tmp_path / "copy").check()
    assert sorted(read) == ["images.npy", "index.parquet", "labels.npy"], "a copy is another file"
    times = os.stat(store.path / "labels.npy")
    flip(store.path / "labels.npy", 0.9)
    os.utime(store.path / "labels.npy", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert "labels.npy" in refused(store.check), "the same size and time of writing"


def test_without_a_place_for_notes_a_store_is_read_all_the_same(made, monkeypatch):
    monkeypatch.setattr(digests, "NOTED_BYTES", 0)
    (made.path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(made.path / "file"))
    FaceStore(made.store).check()
    flip(made.store / "images.npy", 0.3)
    assert "images.npy" in refused(FaceStore(made.store).check)


def test_a_changed_store_is_no_other_store(made):
    """Who changes a store and its manifest has another store, which a run does not go on with."""
    flip(made.store / "labels.npy", 0.5)
    let_manifest_agree(made.store, "labels.npy")
    assert "data_fingerprint" in refused(plan, made.path)


# Results


def tables(sweep):
    runs = sweep.runs.drop(columns=["error", "damaged", "path"])
    return [sweep.metrics, sweep.curves, sweep.latents, sweep.distances, runs]


def test_every_flipped_bit_of_results_is_named_or_without_effect(made):
    good, named = tables(load_sweep(made.sweep)), 0
    for name in (*RESULT_FILES, "status.json", "../../sweep.json"):
        path = made.run / name
        whole = path.read_bytes()
        for place in range(10):
            flip(path, place / 9)
            try:
                sweep = load_sweep(made.sweep)
            except FaceVAEError as error:
                assert path.name in str(error)
                named += 1
            else:
                said = sweep.runs.error.item()
                same = all(a.equals(b) for a, b in zip(tables(sweep), good))
                assert path.name in said or (same and not name.startswith("model")), (name, place)
                named += bool(said)
            path.write_bytes(whole)
    assert named > 60
    assert all(a.equals(b) for a, b in zip(tables(load_sweep(made.sweep)), good))


def test_damage_is_named_in_status_and_report_and_by_the_same_command(made):
    damaged = ["log.jsonl", "latents.parquet", "model/model.safetensors"]
    for name in damaged:
        os.truncate(made.run / name, (made.run / name).stat().st_size - 40)
    before = contents(made.run)
    sweep = load_sweep(made.sweep)
    assert list(sweep.runs.state) == ["done"] and len(sweep.metrics)
    assert sweep.latents.empty and sweep.curves.empty, "what is damaged is not used"
    analysis = SweepAnalysis(sweep, resamples=100)
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    train_again = ["train", "--hypothesis", "H9", "--data", made.store, "--out", made.run, *settings]
    for said in (
        facevae_here("status", made.sweep).stdout,
        render_markdown(analysis, study_figures(analysis)).replace("\\", ""),
        facevae_here(*train_again).stderr,
    ):
        assert all(f"{name}' changed after it was written" in said for name in damaged)
        assert "Delete it and give the command of the run again" in said
    assert facevae_here(*train_again).returncode == 1
    assert run_sweep(plan(made.path), made.store, progress=False) == ["H9 seed 0"]
    assert contents(made.run) == before, "damage is left to its owner"


@pytest.mark.parametrize(
    "name",
    ["metrics.parquet", "latents.parquet", "distances.parquet", "model/model.safetensors", "config.json"],
)
def test_what_is_missing_is_made_again(made, name):
    (made.run / name).unlink()
    assert read_state(made.run)["state"] == "interrupted" and name in read_state(made.run)["error"]
    (spec,) = plan(made.path)
    assert not spec.done(FaceStore(made.store))
    log = (made.run / "log.jsonl").read_bytes()
    train(spec.config, made.store, made.run, progress=False)
    evaluate_run(made.run, made.store)
    assert read_state(made.run)["state"] == "done" and not load_sweep(made.sweep).runs.error.item()
    assert (made.run / "log.jsonl").read_bytes() == log, "nothing was trained again"


def test_a_damaged_configuration_is_not_replaced(made):
    """Nobody knows what such a run is, so it is not gone on with as if it were what is asked for."""
    config = RunDirectory(made.run).config
    flip(made.run / "config.json", 0.5)
    before = contents(made.run)
    assert "config.json" in refused(plan, made.path)
    assert "config.json" in refused(train, config, made.store, made.run)
    assert contents(made.run) == before


# Trouble in reading


@pytest.fixture(
    params=TROUBLE, ids=lambda code: code.__name__ if isinstance(code, type) else errno.errorcode[code]
)
def broken(request, monkeypatch):
    """broken(name): from now on, whatever has that name in its path cannot be read."""

    def trouble(name):
        def failing(real):
            def call(path, *arguments, **options):
                mode = (
                    arguments[0] if arguments and isinstance(arguments[0], str) else options.get("mode", "r")
                )
                if name in str(path) and "r" in mode:
                    raise (
                        request.param() if request.param is MemoryError else OSError(request.param, "trouble")
                    )
                return real(path, *arguments, **options)

            return call

        monkeypatch.setattr(builtins, "open", failing(open))
        monkeypatch.setattr(os, "listdir", failing(os.listdir))

    return trouble


@pytest.mark.parametrize("name", ["step-", "best.safetensors", "seed0/checkpoint"])
def test_training_does_not_begin_again_because_a_checkpoint_cannot_be_read(made, broken, name):
    model, before = FaceVAE(RunDirectory(made.run).config.model), contents(made.run / "checkpoint")
    optimizer = ClippedAdam(model.parameters())
    broken(name)
    with pytest.raises(UnreadableFile, match="could not be read"):
        load_checkpoint(made.run / "checkpoint", model, optimizer)
    assert contents_unbroken(made.run / "checkpoint") == before


@pytest.mark.parametrize("broken", [errno.EIO], indirect=True, ids=["EIO"])
def test_a_run_whose_checkpoint_cannot_be_read_is_interrupted(made, broken):
    """And not failed: the same command goes on with it as soon as it can be read."""
    config, before = RunDirectory(made.run).config, contents(made.run / "checkpoint")
    broken("step-")
    with pytest.raises(RunInterrupted, match="could not be read"):
        train(config, made.store, made.run, progress=False)
    assert contents_unbroken(made.run / "checkpoint") == before
    status = read_state(made.run)
    assert status["state"] == "interrupted" and "step-" in status["error"]


def contents_unbroken(folder: Path) -> dict[str, bytes]:
    """`contents`, read past the functions that a test has broken."""
    found = {}
    for entry in os.scandir(folder):
        handle = os.open(entry.path, os.O_RDONLY)
        found[entry.name] = os.read(handle, 2**30)
        os.close(handle)
    return found


@pytest.mark.parametrize(
    "name", ["status.json", "config.json", "sweep.json", "manifest.json", "index.parquet"]
)
def test_a_sweep_is_not_planned_anew_because_a_file_cannot_be_read(made, broken, name):
    before = contents(made.path)
    digests._DIGESTS.clear()
    broken(name)
    with pytest.raises(UnreadableFile, match=name):
        plan(made.path)
    for path in ("sweep/sweep.json", "sweep/H9/seed0/status.json", "sweep/H9/seed0/config.json"):
        handle = os.open(made.path / path, os.O_RDONLY)
        assert os.read(handle, 2**20) == before[path]
        os.close(handle)


def test_what_cannot_be_read_is_said_and_the_rest_is_shown(made, broken):
    digests._DIGESTS.clear()
    broken("seed0/metrics.parquet")
    assert "metrics.parquet" in facevae_here("status", made.sweep).stdout
    runs = load_sweep(made.sweep).runs
    assert runs.state.item() == "unusable" and "could not be read" in runs.error.item()
    broken("seed0/status.json")
    assert "status.json" in facevae_here("status", made.sweep).stdout
    assert "could not be read" in load_sweep(made.sweep).runs.error.item()
    assert "H9" in str(read_sweep(made.sweep))


def test_models_and_directions_that_cannot_be_read_are_not_taken_for_missing(made, broken):
    vae = FaceVAE.from_pretrained(made.run / "model")
    (made.path / "directions.safetensors").write_bytes(b"x")
    assert read_directions(made.path / "directions.safetensors", vae) is None
    broken(".safetensors")
    with pytest.raises(UnreadableFile):
        read_directions(made.path / "directions.safetensors", vae)
    with pytest.raises(UnreadableFile):
        FaceVAE.from_pretrained(made.run / "model")


def test_damaged_checkpoints_are_set_aside_and_not_deleted(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = ClippedAdam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    for step in (4, 8):
        save_checkpoint(tmp_path, step, model, optimizer, {})
        flip(tmp_path / f"step-{step:08d}.safetensors", 1)
    damaged = sorted(contents(tmp_path).values())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert load_checkpoint(tmp_path, model, optimizer) is None
    assert len(caught) == 2 and "is passed over" in str(caught[0].message)
    save_checkpoint(tmp_path, 4, model, optimizer, {})
    kept = contents(tmp_path)
    whole = kept.pop("step-00000004.safetensors")
    assert sorted(kept.values()) == damaged and all(name.endswith(".damaged") for name in kept)
    save_checkpoint(tmp_path, 8, model, optimizer, {})
    assert load_checkpoint(tmp_path, model, optimizer)["step"] == 8
    assert contents(tmp_path)["step-00000004.safetensors"] == whole
