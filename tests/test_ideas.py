"""Terms, metrics and networks of one's own, and those that the paper does not have, as a user meets them."""

import json
import shlex
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import TINY, facevae_here, forgotten

from facevae.analysis.claims import SweepAnalysis
from facevae.analysis.report import render_markdown
from facevae.analysis.results import load_sweep
from facevae.config import ModelConfig, make_config, parse_settings
from facevae.core import FaceVAEError
from facevae.data.store import FaceStore
from facevae.model.losses import check_terms, loss_terms
from facevae.model.vae import FaceVAE, FaceVAEOutput
from facevae.registry import PLUGINS, REGISTRIES, TERMS, load_installed_plugins, load_plugin
from facevae.sweep.plan import RunSpec, plan_sweep
from facevae.sweep.scheduler import run_sweep
from facevae.training.evaluation import evaluate_run
from facevae.training.run import RunDirectory, config_fields
from facevae.training.trainer import train

IDEAS = Path(__file__).parent / "data" / "my_ideas.py"
OVERRIDES = parse_settings(TINY[1::2])


@pytest.fixture(autouse=True)
def own_registries():
    with forgotten():
        yield


@pytest.fixture
def ideas(tmp_path):
    """A plugin of the user's, with a term, a metric and a network."""
    return Path(shutil.copy(IDEAS, tmp_path / "my_ideas.py"))


@pytest.fixture(scope="module")
def study(store, shared):
    """A finished study of a sum of terms that the paper does not have, on a plugin's network."""

    def make(folder):
        sums = ["edges+ms_ssim+charbonnier+mask"]
        with forgotten():
            load_plugin(IDEAS)
            specs = plan_sweep(store, folder / "sweep", sums, overrides=OVERRIDES | {"network": "tiny"})
            assert not run_sweep(specs, store, progress=False)

    return shared("ideas", make) / "sweep"


NAME = "ms_ssim+charbonnier+edges+mask"  # however it was written


def test_the_file_travels_into_the_run_and_its_digest_into_the_configuration(study):
    run = study / NAME / "seed0"
    assert (run / "plugins" / "my_ideas.py").read_bytes() == IDEAS.read_bytes()
    config = json.loads((run / "config.json").read_text())
    assert config["plugins"] == {"my_ideas.py": load_plugin(IDEAS).digest} and config["network"] == "tiny"
    assert config["weights"]["edges"] == 2
    parameters = json.loads((run / "train.ipynb").read_text())["metadata"]["papermill"]["parameters"]
    assert parameters["plugins"] == str(run / "plugins" / "my_ideas.py")


def test_terms_of_any_kind_are_logged_by_name(study):
    line = json.loads((study / NAME / "seed0" / "log.jsonl").read_text().splitlines()[-1])
    assert set(line["raw"]) == {"ms_ssim", "charbonnier", "edges", "kl", "mask_bce", "mask_dice"}
    assert line["weighted"]["edges"] == pytest.approx(2 * line["raw"]["edges"])


def test_the_metric_is_a_column_of_every_view_and_in_the_report(study):
    table = pd.read_parquet(study / NAME / "seed0" / "metrics.parquet")
    assert table.groupby("view").edge_error.count().eq(8).all() and set(table["view"]) > {"raw", "face"}
    analysis = SweepAnalysis(load_sweep(study), resamples=50)
    page = render_markdown(analysis, {})
    assert "Edge error" in page and "--plugin my_ideas.py" in page


def test_results_and_claims_need_no_plugin(study, tmp_path):
    """A table says how its metrics are read, so whoever reads a study runs nobody's code."""
    copy = Path(shutil.copytree(study, tmp_path / "study"))
    claim = f'first = "H9"\nsecond = "{NAME}"\nmetrics = ["edge_error"]\nexpect = "better"'
    (copy / "claims.toml").write_text(f'[[claim]]\nname = "a"\nquestion = "b"\nstatement = "c"\n{claim}\n')
    analysis = SweepAnalysis(load_sweep(copy), resamples=50)
    assert "edges" not in TERMS and not PLUGINS
    summary = analysis.summary[analysis.summary.metric == "edge_error"]
    assert set(summary["view"]) > {"face", "raw"} and summary.score.eq(-summary["mean"]).all(), (
        "lower is better"
    )
    assert analysis.parts[analysis.parts.claim == "a"].missing.tolist() == ["not in this sweep"]


def test_a_changed_or_missing_plugin_is_named_before_anything_is_started(study, store, ideas, tmp_path):
    run = Path(shutil.copytree(study / NAME / "seed0", tmp_path / "run"))
    command = ["train", "--hypothesis", NAME, "--data", store, "--out", run, *TINY, "--set", "network=tiny"]
    without = facevae_here(*command)
    assert without.returncode == 1 and "--plugin FILE" in without.stderr
    ideas.write_text(ideas.read_text() + "\n# another thought\n")
    changed = facevae_here(*command, "--plugin", ideas)
    assert changed.returncode == 1 and len(changed.stderr.strip().splitlines()) == 1
    assert "plugins is {'my_ideas.py': '" in changed.stderr and "--accept-code" in changed.stderr
    accepted = facevae_here(*command, "--plugin", ideas, "--accept-code")
    assert accepted.returncode == 0 and "finished already" in accepted.stdout


def test_a_model_with_a_network_of_somebody_else_runs_no_code(study, tmp_path):
    model = study / NAME / "seed0" / "model"
    with pytest.raises(FaceVAEError, match="'tiny', which comes from a plugin that is not loaded"):
        FaceVAE.from_pretrained(model)
    assert "tiny" not in REGISTRIES[-1] and not PLUGINS
    load_plugin(IDEAS)
    assert FaceVAE.from_pretrained(model).config.network == "tiny"


def test_commands_on_a_model_take_the_plugin(study, tmp_path):
    from PIL import Image

    from facevae.synthetic.render import draw_faces

    face = draw_faces([0], seed=1, size=72).images[0]
    Image.fromarray(face.numpy()).save(tmp_path / "face.png")
    model = study / NAME / "seed0" / "model"
    command = ["reconstruct", model, tmp_path / "face.png", "--out", tmp_path / "out", "--no-align"]
    assert "plugin that is not loaded" in facevae_here(*command).stderr
    done = facevae_here(*command, "--plugin", IDEAS)
    assert done.returncode == 0 and any((tmp_path / "out").glob("*.png")), done.stderr


def test_the_report_and_the_page_load_the_same_files(study, monkeypatch):
    import facevae.sweep.plan as plan

    started = []
    monkeypatch.setattr(plan, "start_notebook", lambda *arguments: started.append(arguments))
    monkeypatch.setattr(plan, "wait_for_notebook", lambda process: None)
    plan.run_report(study)
    load_plugin(IDEAS)
    plan.run_report(study)
    parameters = [arguments[2] for arguments in started]
    assert "plugins" not in parameters[0] and parameters[1]["plugins"] == shlex.join([str(IDEAS)])


BROKEN = {
    "def": "is not valid Python (line 1",
    "1 / 0": "ZeroDivisionError: division by zero",
    "raise SystemExit(3)": "SystemExit: 3",
    "x = 1": "registers nothing",
    "import facevae\nfacevae.register_term('ssim')(print)": "The image term 'ssim' cannot be registered",
    "import facevae\nfacevae.register_term('h9')(print)": "The image term 'h9' cannot be registered",
    "import facevae\nfacevae.register_metric('m', better='up')(print)": "better='up'",
    "import facevae\nfacevae.register_network('paper')(print)": "The network 'paper' cannot be registered",
    None: "is missing",
}


@pytest.mark.parametrize("text", BROKEN, ids=[str(number) for number in range(len(BROKEN))])
def test_what_is_wrong_with_a_plugin_is_one_sentence(text, store, tmp_path):
    if text is not None:
        (tmp_path / "bad.py").write_text(text)
    command = ["train", "--hypothesis", "H9", "--data", store, "--out", tmp_path / "run"]
    before = [dict(registry) for registry in REGISTRIES]
    done = facevae_here(*command, "--plugin", tmp_path / "bad.py")
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert BROKEN[text] in done.stderr and not (tmp_path / "run").exists()
    assert [dict(registry) for registry in REGISTRIES] == before


WRONG = {
    "return (recon - target).square()": r"gives \(2, 3, 36, 36\) for 2 images",
    "return 0.5": "gives float for 2 images",
    "return (recon / 0).mean()": "gives a value that is not finite",
    "return (recon - target).square().sqrt().mean()": "gives a gradient that is not finite",
    "return recon.nonsense": "AttributeError",
}


@pytest.mark.parametrize("body", WRONG, ids=[str(number) for number in range(len(WRONG))])
def test_a_term_that_cannot_be_trained_is_said_before_the_first_step(body, store, tmp_path):
    text = f"import facevae\n\n\n@facevae.register_term('wrong')\ndef wrong(recon, target):\n    {body}\n"
    (tmp_path / "bad.py").write_text(text)
    load_plugin(tmp_path / "bad.py")
    config = make_config("l1+wrong+mask", overrides=OVERRIDES)
    with pytest.raises(FaceVAEError, match=f"'wrong'.*{WRONG[body]}"):
        train(config, store, tmp_path / "run", progress=False)
    assert RunDirectory(tmp_path / "run").status["state"] == "failed"
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_no_term_pulls_at_the_background():
    load_plugin(IDEAS)
    generator = torch.Generator().manual_seed(0)
    images, recon = torch.rand(2, 2, 3, 72, 72, generator=generator)
    mask = torch.zeros(2, 1, 72, 72)
    mask[..., 20:50, 30:60] = 1
    recon.requires_grad_()
    zeros = torch.zeros(2, 4)
    assert "edges" in TERMS
    for name in TERMS:
        out = FaceVAEOutput(recon, mask, zeros, zeros, zeros)
        value = loss_terms(out, images, mask, (name,))[name]
        (gradient,) = torch.autograd.grad(value, recon)
        assert gradient.isfinite().all() and gradient.abs().max() > 0, name
        assert (gradient * (1 - mask)).abs().max() == 0, name
        moved = recon + torch.rand(recon.shape, generator=generator) * (1 - mask)
        again = loss_terms(out._replace(recon=moved), images, mask, (name,))[name]
        assert torch.equal(again, value), f"{name} sees the background"


def test_terms_have_a_finite_gradient_where_images_are_flat_or_equal():
    """Black faces, as a network draws them that has learned nothing, must not end a run."""
    for name in TERMS:
        check_terms((name,), 36, torch.device("cpu"), mask=True)
        pred = torch.zeros(2, 3, 36, 36, requires_grad=True)
        zeros = torch.zeros(2, 4)
        values = loss_terms(
            FaceVAEOutput(pred, None, zeros, zeros, zeros), torch.zeros(2, 3, 36, 36), None, (name,)
        )
        (gradient,) = torch.autograd.grad(values[name], pred)
        assert gradient.isfinite().all(), name


def test_the_modern_network_does_all_that_the_papers_does(store, tmp_path):
    pytest.importorskip("onnxruntime")
    import onnxruntime

    from facevae.explore.explorer import LatentExplorer

    config = make_config("ssim+l2+lpips+mask", overrides=OVERRIDES | {"network": "modern"})
    model = train(config, store, tmp_path / "run", progress=False)
    table = evaluate_run(tmp_path / "run", store)
    assert table.lpips.notna().all()
    vae = FaceVAE.from_pretrained(model)
    assert (
        vae.config == config.fit(36).model
        and json.loads((model / "config.json").read_text())["network"] == "modern"
    )
    images = torch.rand(2, 3, 36, 36)
    session = onnxruntime.InferenceSession(str(vae.to_onnx(tmp_path / "model.onnx")))
    recon = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
    assert torch.allclose(torch.from_numpy(recon), vae(images).recon, atol=1e-4)
    assert vae.reconstruct(images[0]).predicted.size == (36, 36)
    LatentExplorer(vae, FaceStore(store))


def test_what_was_there_before_is_as_it_was(store):
    """A new setting at its default changes no fingerprint, no file and no name."""
    config = make_config("H9", "paper")
    assert "network" not in config.model_dump() and "network" not in ModelConfig().model_dump()
    assert not {"plugins", "network"} & config_fields(config, FaceStore(store)).keys()
    assert config.weights.keys() == {"ssim", "l1", "l2", "kl", "mask_bce", "mask_dice"}


def test_a_plugin_that_a_run_does_not_use_leaves_it_alone(ideas, store, tmp_path):
    text = ideas.read_text()
    ideas.write_text(text[: text.index("@facevae.register_metric")])  # the term alone
    load_plugin(ideas)
    assert "plugins" not in config_fields(make_config("H9"), FaceStore(store))
    assert "plugins" in config_fields(make_config("ssim+edges"), FaceStore(store))


def test_what_was_registered_in_a_session_alone_does_not_start_a_process(store, tmp_path):
    import facevae

    @facevae.register_term("local")
    def local(recon, target):
        return (recon - target).abs().mean()

    config = make_config("local", overrides=OVERRIDES).fit(36)
    with pytest.raises(FaceVAEError, match="registered in this session alone.*--plugin"):
        RunSpec(config, RunDirectory(tmp_path / "run"), OVERRIDES, store).job()


@pytest.mark.parametrize(
    "text, expected", [(None, None), ("1 / 0", "plugin 'shapes' failed while it was loaded")]
)
def test_an_installed_package_is_asked_for_a_name_that_is_not_known(text, expected, tmp_path, monkeypatch):
    (tmp_path / "their_ideas.py").write_text(text or IDEAS.read_text().replace('"edges"', '"their_edges"'))
    info = tmp_path / "their_ideas-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-ideas\nVersion: 1.5\n")
    (info / "entry_points.txt").write_text("[facevae.plugins]\nshapes = their_ideas\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("facevae.registry._installed", [])
    monkeypatch.delitem(__import__("sys").modules, "their_ideas", raising=False)
    if expected:
        with pytest.raises(FaceVAEError, match=expected):
            load_installed_plugins()
        return
    (plugin,) = make_config("ssim+their_edges").plugins
    assert (plugin.name, plugin.digest, plugin.installed) == ("shapes", "1.5", True)


def test_the_preset_modern_brings_its_own_hypothesis_network_and_weights(store, tmp_path):
    done = facevae_here("train", "--data", store, "--out", tmp_path / "run", "--preset", "modern", *TINY)
    assert done.returncode == 0, done.stderr
    assert "ssim+l1+lpips+texture+mask, preset modern" in done.stdout
    config = RunDirectory(tmp_path / "run").config
    assert (config.network, config.optimizer, config.weights["texture"]) == ("modern", "muon", 12)
    command = (tmp_path / "run" / "model" / "README.md").read_text().split("facevae train ")[1].split("`")[0]
    words = shlex.split(command)
    given = {word: value for word, value in zip(words, words[1:]) if word in ("--hypothesis", "--preset")}
    settings = parse_settings(value for word, value in zip(words, words[1:]) if word == "--set")
    assert make_config(given["--hypothesis"], given["--preset"], overrides=settings) == config
    refused = facevae_here("train", "--data", store, "--out", tmp_path / "other", *TINY)
    assert refused.returncode == 1 and "no hypothesis of its own" in refused.stderr
