"""Checks on the repository itself: clean notebooks, library in sync, README, environment.yml, import order.

Run as a program it prints what is wrong and leaves with code 1; --write-readme renders README.md from index.ipynb first.
"""

import ast
import configparser
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
LIMIT = 1_000_000


def source(cell) -> str:
    return "".join(cell["source"])


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def run(*command, cwd) -> None:
    done = subprocess.run(
        [str(Path(sys.executable).parent / command[0]), *command[1:]], cwd=cwd, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")


def copy_of_sources(folder: str) -> Path:
    """The sources alone, so that a check never changes the tree it looks at."""
    target = Path(folder) / "copy"
    shutil.copytree(
        ROOT,
        target,
        ignore=shutil.ignore_patterns(".git", ".venv", "demo", "runs", "__pycache__", "*.egg-info", "build"),
    )
    return target


def notebooks_are_clean():
    """nbdev_clean changes nothing, and no notebook is large."""
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_of_sources(folder)
        run("nbdev_clean", cwd=copy)
        for path in NOTEBOOKS:
            if read(copy / path.relative_to(ROOT)) != read(path):
                yield f"{path.relative_to(ROOT)} is not clean: run nbdev_clean"
            if path.stat().st_size > LIMIT:
                yield f"{path.relative_to(ROOT)} is larger than 1 MB: make its outputs smaller"


def library_is_exported():
    """nbdev_export changes nothing."""
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_of_sources(folder)
        run("nbdev_export", cwd=copy)
        for path in sorted({p.name for where in (ROOT, copy) for p in (where / "facevae").glob("*.py")}):
            mine, fresh = (where / "facevae" / path for where in (ROOT, copy))
            if not mine.exists() or not fresh.exists() or mine.read_text() != fresh.read_text():
                yield f"facevae/{path} is not what the notebooks export: run nbdev_export"
        exported = {
            re.sub(r".*default_exp\s+(\w+).*", r"\1", source(cell), flags=re.S)
            for path in NOTEBOOKS
            for cell in read(path)["cells"]
            if source(cell).startswith("#| default_exp")
        }
        for path in (ROOT / "facevae").glob("*.py"):
            if path.stem not in exported | {"__init__", "_modidx"}:
                yield f"facevae/{path.name} has no notebook: delete it"


def rendered_readme() -> str:
    """index.ipynb as Markdown, with the paths of pictures and notebooks made relative to the top."""
    from nbconvert import MarkdownExporter

    text, _ = MarkdownExporter().from_filename(str(ROOT / "nbs" / "index.ipynb"))
    text = re.sub(r'(src="|\]\()(images/|tutorials/|\w+\.ipynb)', r"\1nbs/\2", text)
    text = text.replace("](../", "](")
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def readme_is_rendered():
    """README.md is what index.ipynb renders to."""
    if (ROOT / "README.md").read_text(encoding="utf-8") != rendered_readme():
        yield "README.md differs from nbs/index.ipynb: run python tests/check_repository.py --write-readme"


def settings() -> configparser.SectionProxy:
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def environment_names_the_requirements():
    """environment.yml installs the same requirements as settings.ini names."""
    text = (ROOT / "environment.yml").read_text(encoding="utf-8")
    named = set(re.findall(r"^\s+- ([^\s:]+)$", text, flags=re.M))
    asked = set(settings()["requirements"].split()) | set(settings()["dev_requirements"].split())
    for requirement in sorted(asked - named):
        yield f"environment.yml lacks {requirement}, which settings.ini names"
    for requirement in sorted(named - asked - {"pip", "conda-forge", "python=3.11", "make"}):
        yield f"environment.yml names {requirement}, which settings.ini lacks"


def imports_go_downwards():
    """A notebook imports only modules whose notebooks come before it."""
    order = {}
    numbered = [path for path in NOTEBOOKS if re.match(r"\d", path.name)]
    for position, path in enumerate(numbered):
        for cell in read(path)["cells"]:
            if found := re.match(r"#\| default_exp (\w+)", source(cell)):
                order[found[1]] = position
    for position, path in enumerate(numbered):
        for cell in read(path)["cells"]:
            if cell["cell_type"] != "code":
                continue
            code = "\n".join(line for line in source(cell).splitlines() if not line.startswith(("%", "!")))
            for node in ast.walk(ast.parse(code)):
                modules = (
                    [node.module]
                    if isinstance(node, ast.ImportFrom) and node.module
                    else ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [])
                )
                for module in modules:
                    name = module.removeprefix("facevae.")
                    if module.startswith("facevae.") and order.get(name, -1) > position:
                        yield f"{path.name} imports {module}, whose notebook comes later"
                    if module.startswith("facevae.") and name not in order:
                        yield f"{path.name} imports {module}, which no notebook exports"


def parameters_are_tagged():
    """The notebooks that papermill runs have a parameters cell."""
    for path in sorted((ROOT / "nbs" / "experiments").glob("*.ipynb")):
        if sum("parameters" in cell["metadata"].get("tags", []) for cell in read(path)["cells"]) != 1:
            yield f"{path.relative_to(ROOT)} needs exactly one cell tagged 'parameters'"


# What runs code that stands in a file, or can be made to: by module, by function, by argument.
EXECUTING_MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "runpy",
    "code",
    "codeop",
    "yaml",
}
EXECUTING_CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "breakpoint",
    "torch.jit.load",
    "torch.package",
    "torch.hub.load",
    "os.system",
    "os.popen",
    "pd.read_pickle",
    "pandas.read_pickle",
    "np.fromregex",
    "numpy.fromregex",
    "np.lib.format.read_array",
    "pd.eval",
    "tempfile.mktemp",
}
EXECUTING_METHODS = {"to_pickle", "read_pickle", "query"}
SAFE_ARGUMENTS = {
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
    "jinja2.Environment": ("autoescape", True),
    "jinja2.Template": ("autoescape", True),
    "torch.load": ("weights_only", True),
}


def executing(source: str):
    """What in a Python source may run code from a file: (line, what)."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [alias.name for alias in node.names]
            )
            yield from (
                (node.lineno, f"imports {module}")
                for module in modules
                if module.split(".")[0] in EXECUTING_MODULES
            )
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            arguments = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
            if name in EXECUTING_CALLS or name.rpartition(".")[2] in EXECUTING_METHODS:
                yield node.lineno, f"calls {name}"
            if (
                name in SAFE_ARGUMENTS
                and arguments.get(SAFE_ARGUMENTS[name][0]) is not SAFE_ARGUMENTS[name][1]
            ):
                yield node.lineno, f"calls {name} without {SAFE_ARGUMENTS[name][0]}={SAFE_ARGUMENTS[name][1]}"
            for argument, bad in (
                ("allow_pickle", True),
                ("shell", True),
                ("weights_only", False),
                ("trust_remote_code", True),
            ):
                if arguments.get(argument) is bad:
                    yield node.lineno, f"calls {name} with {argument}={bad}"


def nothing_executes_files():
    """The library holds nothing that could run code from a file: no pickle, no eval, no shell."""
    for path in sorted((ROOT / "facevae").glob("*.py")):
        for line, what in executing(path.read_text(encoding="utf-8")):
            yield f"facevae/{path.name}:{line} {what}, which may run code from a file"


CHECKS = (
    notebooks_are_clean,
    library_is_exported,
    readme_is_rendered,
    environment_names_the_requirements,
    imports_go_downwards,
    parameters_are_tagged,
    nothing_executes_files,
)

if __name__ == "__main__":
    if "--write-readme" in sys.argv:
        (ROOT / "README.md").write_text(rendered_readme(), encoding="utf-8")
    problems = [problem for check in CHECKS for problem in check()]
    print("\n".join(problems) or f"{len(CHECKS)} checks of the repository passed")
    sys.exit(bool(problems))
