"""Checks on the repository: clean notebooks, library in sync, direction of imports, README, environment.yml.

What a source may hold is checked by check_code.py. Run as a program this prints what is wrong, by both, and
leaves with code 1; --write-readme renders README.md from index.ipynb first.
"""

import configparser
import json
import re
import shutil
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

from check_code import CODE_CHECKS, LIBRARY, MAX_COLUMNS, NOTEBOOKS, ROOT, imports, read, source

NUMBERED = [path for path in NOTEBOOKS if re.match(r"\d", path.relative_to(ROOT / "nbs").parts[0])]
HAND_WRITTEN = {"__init__", "_lazy", "_moved", "_modidx", "_paths"}  # no notebook exports them
MAX_NOTEBOOK, MAX_OUTPUT = 1_000_000, 200_000  # bytes

# Who may import whom, from the bottom to the top. The notebook on the architecture shows the same.
IMPORTS = {
    "core": "",
    "atomic_io": "core",
    "plotting": "core atomic_io",
    "safe_io": "core atomic_io",
    "children": "core atomic_io",
    "registry": "core safe_io",
    "system": "",
    "data": "core atomic_io safe_io system",
    "synthetic": "core data",
    "parsing": "core atomic_io safe_io data",
    "config": "core registry data",
    "metrics": "core atomic_io safe_io registry",
    "model": "core atomic_io safe_io registry data config metrics",
    "training": "core atomic_io safe_io registry system data config metrics model",
    "sweep": "core atomic_io safe_io children registry system data config training",
    "analysis": "core atomic_io plotting safe_io data metrics model training sweep",
    "editing": "core atomic_io data model",
    "explore": "core atomic_io children registry data synthetic model editing",
    "bench": "core atomic_io plotting system data synthetic config metrics model training",
    "cli": "core atomic_io safe_io children registry system data synthetic parsing config metrics model "
    "training sweep editing explore bench",
    "launch": "training",  # python -m facevae.launch
}

# Cells that are not exported may show things on drawn faces, and on a store of them.
SHOWN_ON = {"synthetic.render", "data.packing"}

# What must be importable without what: whoever watches over runs, or reads their results, needs neither.
WITHOUT = {
    "torch pandas": "facevae registry config metrics.tables data.store training.lock training.run"
    " sweep.runner sweep.plan sweep.status sweep.cluster sweep.scheduler",
    "torch": "analysis.results analysis.statistics analysis.answers analysis.claims analysis.plots"
    " analysis.faces analysis.figures analysis.tables analysis.report",
}


def run(*command, cwd) -> None:
    program = str(Path(sys.executable).parent / command[0])
    done = subprocess.run([program, *command[1:]], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")


def copy_of_sources(folder: str) -> Path:
    """The sources alone, so that a check never changes the tree it looks at."""
    target = Path(folder) / "copy"
    left_out = (".git", ".venv", "demo", "runs", "__pycache__", "*.egg-info", "build")
    shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(*left_out))
    return target


def notebooks_are_clean():
    """nbdev_clean changes nothing, nothing is large, and no output names a place on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_of_sources(folder)
        run("nbdev_clean", cwd=copy)
        for path in NOTEBOOKS:
            name = path.relative_to(ROOT)
            if read(copy / name) != read(path):
                yield f"{name} is not clean: run nbdev_clean"
            if path.stat().st_size > MAX_NOTEBOOK:
                yield f"{name} is larger than 1 MB: make its outputs smaller"
            outputs = [json.dumps(one) for cell in read(path)["cells"] for one in cell.get("outputs", ())]
            if max(map(len, outputs), default=0) > MAX_OUTPUT:
                yield f"{name} has an output of more than 200 kB: make it smaller"
            if places := {found for one in outputs for found in re.findall(r"/(?:tmp|root|home)/\w+", one)}:
                yield f"{name} shows a place on the machine it ran on: {', '.join(sorted(places))}"


def library_is_exported():
    """nbdev_export changes nothing, and every module has a notebook."""
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_of_sources(folder)
        run("nbdev_export", cwd=copy)
        trees = [
            {p.relative_to(where): p for p in (where / "facevae").rglob("*.py")} for where in (ROOT, copy)
        ]
        for name in sorted(trees[0].keys() | trees[1].keys()):
            mine, fresh = (tree[name].read_text() if name in tree else None for tree in trees)
            if mine != fresh:
                yield f"{name} is not what the notebooks export: run nbdev_export"
    exported = set(exporting_notebooks())
    for module, path in LIBRARY.items():
        if path.stem not in HAND_WRITTEN and module not in exported | {"launch"}:
            yield f"{path.relative_to(ROOT)} has no notebook: delete it"


def exports(cell: dict) -> bool:
    return source(cell).startswith("#| export")


def exporting_notebooks() -> dict[str, Path]:
    """{module: its notebook}, in the order of the notebooks."""
    return {
        found[1]: path
        for path in NUMBERED
        for cell in read(path)["cells"]
        if (found := re.match(r"#\| default_exp ([\w.]+)", source(cell)))
    }


def notebooks_introduce_themselves():
    """A library notebook has a title for people, and a sentence that says what it holds."""
    for module, path in exporting_notebooks().items():
        title, _, rest = source(read(path)["cells"][0]).partition("\n")
        if not title.startswith("# ") or title[2:] == module or not rest.strip().startswith("> "):
            yield f"{path.relative_to(ROOT)} needs a title, '# ...', and below it one sentence, '> ...'"
            continue
        first = LIBRARY[module].read_text(encoding="utf-8").splitlines()[0]  # the sentence, as a docstring
        if not first.endswith('."""') or len(first) > MAX_COLUMNS:
            yield f"{path.relative_to(ROOT)}: its sentence, '> ...', must end on its line, and fit there"


def imports_go_downwards():
    """A notebook imports only modules of earlier notebooks, a subpackage only those of its row in IMPORTS."""
    order = {module: position for position, module in enumerate(exporting_notebooks())}
    for module, path in exporting_notebooks().items():
        for cell in read(path)["cells"]:
            for name in imports(cell) if cell["cell_type"] == "code" else ():
                if name not in order and name.count(".") and name.partition(".")[0] in IMPORTS:
                    yield f"{path.relative_to(ROOT)} imports facevae.{name}, which no notebook exports"
                elif order.get(name, -1) > order[module] and (exports(cell) or name not in SHOWN_ON):
                    yield f"{path.relative_to(ROOT)} imports facevae.{name}, whose notebook comes later"
    for module, path in LIBRARY.items():
        package = module.partition(".")[0]
        if path.stem in HAND_WRITTEN:
            continue
        allowed = {package, "_paths", *IMPORTS.get(package, "").split()}
        for name in imports(path.read_text(encoding="utf-8"), module):
            if name.partition(".")[0] not in allowed:
                yield f"facevae.{module} imports facevae.{name}, which its row in IMPORTS does not allow"
    for lower, upper in pairwise(dict.fromkeys(module.partition(".")[0] for module in order)):
        if list(IMPORTS).index(lower) > list(IMPORTS).index(upper):
            yield f"IMPORTS has {upper} before {lower}; the notebooks have them the other way round"
    for position, (package, allowed) in enumerate(IMPORTS.items()):
        if upwards := set(allowed.split()) - set(list(IMPORTS)[:position]):
            yield f"IMPORTS lets {package} import {', '.join(sorted(upwards))}, which stands above it"


def imports_are_light():
    """Reading runs and watching over them takes neither torch nor pandas; `import facevae` takes neither."""
    for packages, modules in WITHOUT.items():
        for module in modules.split():
            name = "facevae" if module == "facevae" else f"facevae.{module}"
            code = f"import sys, {name}; print(*(set({packages.split()}) & set(sys.modules)))"
            done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
            if done.returncode or done.stdout.strip():
                yield f"import {name} takes {done.stdout.strip() or done.stderr.strip()}"


def rendered_readme() -> str:
    """index.ipynb as Markdown, with the paths of images and notebooks made relative to the top."""
    from nbconvert import MarkdownExporter

    text, _ = MarkdownExporter().from_filename(str(ROOT / "nbs" / "index.ipynb"))
    text = re.sub(r'(src="|\]\()(?=images/|[\w/]+\.ipynb)', r"\1nbs/", text)
    text = text.replace("](../", "](")
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def readme_is_rendered():
    """README.md is what index.ipynb renders to, and its links lead somewhere."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    if text != rendered_readme():
        yield "README.md differs from nbs/index.ipynb: run python tests/check_repository.py --write-readme"
    for target in re.findall(r'(?:\]\(|src=")([^)"]+)', text):
        if "://" not in target and not (ROOT / target.partition("#")[0]).exists():
            yield f"README.md leads to {target}, which is not there"


def architecture_shows_the_imports():
    """The table in architecture.ipynb lists every folder with what it imports, as IMPORTS has it."""
    text = "\n".join(source(cell) for cell in read(ROOT / "nbs" / "architecture.ipynb")["cells"])
    rows = dict(re.findall(r"^\| \[?`(\w+)`[^|]*\|[^|]*\| *([\w ,]*?) *\|$", text, flags=re.M))
    for package, allowed in IMPORTS.items():
        if package == "launch":
            continue
        if package not in rows:
            yield f"nbs/architecture.ipynb has no row for {package} in its table of folders"
        elif rows[package].replace(",", " ").split() != allowed.split():
            shown = rows[package] or "nothing"
            yield f"nbs/architecture.ipynb lets {package} import {shown}, IMPORTS {allowed}"


def settings() -> configparser.SectionProxy:
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def environment_names_the_requirements():
    """environment.yml installs the same requirements as settings.ini names."""
    text = (ROOT / "environment.yml").read_text(encoding="utf-8")
    named = set(re.findall(r"^\s+- ([^\s:]+)$", text, flags=re.M))
    wanted = set(settings()["requirements"].split()) | set(settings()["dev_requirements"].split())
    for requirement in sorted(wanted - named):
        yield f"environment.yml lacks {requirement}, which settings.ini names"
    for requirement in sorted(named - wanted - {"pip", "conda-forge", "python=3.11", "make"}):
        yield f"environment.yml names {requirement}, which settings.ini lacks"


def parameters_are_tagged():
    """The notebooks that papermill runs have a parameters cell."""
    for path in sorted((ROOT / "nbs" / "experiments").glob("*.ipynb")):
        if sum("parameters" in cell["metadata"].get("tags", []) for cell in read(path)["cells"]) != 1:
            yield f"{path.relative_to(ROOT)} needs exactly one cell tagged 'parameters'"


CHECKS = (
    notebooks_are_clean,
    library_is_exported,
    notebooks_introduce_themselves,
    imports_go_downwards,
    imports_are_light,
    readme_is_rendered,
    architecture_shows_the_imports,
    environment_names_the_requirements,
    parameters_are_tagged,
    *CODE_CHECKS,
)

if __name__ == "__main__":
    if "--write-readme" in sys.argv:
        (ROOT / "README.md").write_text(rendered_readme(), encoding="utf-8")
    problems = [problem for check in CHECKS for problem in check()]
    print("\n".join(problems) or f"{len(CHECKS)} checks of the repository passed")
    sys.exit(bool(problems))
