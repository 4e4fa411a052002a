"""Every block of code in README.md and the guide: Python is run, commands are parsed, TOML is read."""

import configparser
import json
import re
import shlex
import subprocess
from unittest import mock

import papermill
import pytest
import typer
from conftest import ROOT, forgotten

from facevae.cli.app import app

SETTINGS = configparser.ConfigParser(delimiters=["="])
SETTINGS.read(ROOT / "settings.ini", encoding="utf-8")
INSTALL_FROM = SETTINGS["DEFAULT"]["install_from"]
GUIDE = json.loads((ROOT / "nbs" / "guide.ipynb").read_text(encoding="utf-8"))
README = "\n".join(
    [
        (ROOT / "README.md").read_text(encoding="utf-8"),
        *("".join(cell["source"]) + "\n" for cell in GUIDE["cells"]),
    ]
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)


def command_lines() -> list[list[str]]:
    """The words of each command line in the README's shell blocks, without comments."""
    lines = "".join(blocks("sh")).replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def parse(command, words: list[str]) -> None:
    """Parse a command line as the command would, down to its subcommand, without running it."""
    context = command.make_context(command.name, words)
    while hasattr(command, "resolve_command"):
        _, command, words = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(command.name, words, parent=context)


@pytest.mark.parametrize("words", command_lines(), ids=" ".join)
def test_a_command_line_is_understood(words, tmp_path, monkeypatch):
    program, *arguments = words
    if program == "facevae":
        monkeypatch.chdir(tmp_path)
        (block,) = [block for block in blocks("python") if "register_term" in block]
        (tmp_path / "my_ideas.py").write_text(block)  # the files that command lines name
        (study,) = blocks("yaml")
        for path in (tmp_path / "study.yaml", tmp_path / "runs" / "h9" / "run.yaml"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(study if path.stem == "study" else "hypothesis: H9\ndata: stores/mine\n")
        with forgotten():
            parse(typer.main.get_command(app), arguments)
    elif program == "make":
        assert (
            subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, capture_output=True).returncode == 0
        )
    elif program == "pip":
        extra = re.fullmatch(r"facevae\[(\w+)\]", arguments[-1])
        assert arguments[0] == "install"
        assert (
            f"{extra[1]}_requirements" in SETTINGS["DEFAULT"]
            if extra
            else arguments[1:]
            in (
                ["torch", "torchvision"],
                [INSTALL_FROM],
            )
        )
    elif program == "papermill":
        known = papermill.inspect_notebook(str(ROOT / arguments[0]))
        assert arguments[2::3] == ["-p"] * len(arguments[2::3]) and set(arguments[3::3]) <= set(known)
    elif program == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        from facevae.training.launch import main

        launched = launch_command_parser().parse_args(arguments[1:])
        assert launched.module and launched.training_script == "facevae.launch"
        launcher = typer.Typer()
        launcher.command()(main)
        parse(typer.main.get_command(launcher), launched.training_script_args)
    else:
        raise AssertionError(f"nothing here knows how to check {program}")


def test_a_command_line_that_is_wrong_is_noticed():
    with pytest.raises(Exception, match="hypothesys"):
        parse(typer.main.get_command(app), ["train", "--hypothesys", "H9", "--data", "store", "--out", "run"])


def test_the_library_in_ten_lines(tmp_path, monkeypatch):
    (block,) = [block for block in blocks("python") if "pack(" in block]
    for usual, tiny in (("count=500", "count=60"), ('{"steps": 200}', '{"steps": 2, "width": 0.1}')):
        assert usual in block
        block = block.replace(usual, tiny)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(block, names)
    assert names["model"] == tmp_path / "runs" / "h9" / "model" or names["model"].is_dir()
    assert names["vae"].config.size == 72


def test_a_model_in_use(tmp_path, monkeypatch):
    from PIL import Image

    from facevae import FaceVAE, draw_faces

    pytest.importorskip("onnxscript", reason="onnxscript is not installed: pip install facevae[onnx]")
    (block,) = [block for block in blocks("python") if "push_to_hub" in block]
    monkeypatch.chdir(tmp_path)
    Image.fromarray(draw_faces([1], size=72).images[0].numpy()).save("photo.jpg")
    names = {}
    with mock.patch("huggingface_hub.hub_mixin.HfApi") as api:
        api.return_value.create_repo.return_value.repo_id = "owner/name"
        exec(block, names)
        assert api.return_value.upload_folder.called
    assert isinstance(names["vae"], FaceVAE) and (tmp_path / "model.onnx").stat().st_size > 1000


def test_a_claim_of_your_own():
    from facevae.analysis.claims import parse_claims

    (block,) = blocks("toml")
    (claim,) = parse_claims(block)
    assert claim.name == "l1-and-l2" and claim.first == "masked l2"


def test_every_block_is_tested():
    languages = re.findall(r"^```(\w*)$", README, flags=re.M)[::2]
    assert set(languages) == {"sh", "python", "toml", "yaml"}
    assert len(blocks("python")) == 3 and len(blocks("toml")) == len(blocks("yaml")) == 1


def test_what_is_installed_is_there():
    """README and tutorials install from where settings.ini says, for no index has it, and quote extras."""
    texts = {path: path.read_text(encoding="utf-8") for path in (ROOT / "nbs").rglob("*.ipynb")}
    texts[ROOT / "README.md"] = README
    for path, text in texts.items():
        assert not re.search(r"pip\s+install(?: --?\w+| torch\w*)* facevae\b(?!-)", text), path
    assert f"pip install {INSTALL_FROM}" in README
    checkout = "../.." if INSTALL_FROM == "." else INSTALL_FROM
    for path in (ROOT / "nbs" / "tutorials").glob("*.ipynb"):
        assert checkout in texts[path] and "facevae-*.whl" in texts[path], path
