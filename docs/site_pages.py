"""Hooks of the site that mkdocs builds of the notebooks: navigation, pages of the API, and links."""

import logging
import posixpath
import re
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parent.parent
LOG = logging.getLogger("mkdocs.hooks.site_pages")  # a warning here fails a strict build
METHOD = ("03_data/02_store", "08_model/04_vae", "08_model/05_losses", "09_training/04_trainer")
METHOD += ("11_analysis/01_statistics",)
LINK = re.compile(r'<a\b([^>]*?)\bhref="([^"#:]+)(#[^"]*)?"')
PLACE = re.compile(r'\bid="([^"]+)"')
TARGET = re.compile(r'<(?:a|img|link|script)\b[^>]*?\b(?:href|src)="([^":]*)"')


def notebooks() -> list[str]:
    """Paths of all notebooks, from the folder that holds them."""
    paths = sorted(path.relative_to(ROOT / "nbs").as_posix() for path in (ROOT / "nbs").rglob("*.ipynb"))
    return [path for path in paths if ".ipynb_checkpoints" not in path]


def packages() -> dict[str, list[str]]:
    """The modules of the library by the folder that holds them; those at the top as "basics"."""
    found = {}
    for path in sorted((ROOT / "facevae").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if not parts[-1].startswith("_"):
            found.setdefault(parts[1] if len(parts) > 2 else "basics", []).append(".".join(parts))
    return found


def navigation() -> list[dict]:
    """Every notebook once: the method first, then tutorials, the study, the guide, and the rest by folder."""
    names, method, folders = notebooks(), [f"{name}.ipynb" for name in METHOD], {}
    for name in names:
        if name not in method and re.match(r"\d", name):
            folder = posixpath.dirname(name).partition("_")[2] or "basics"
            folders.setdefault(folder, []).append(name)
    return [
        {"facevae": "index.ipynb"},
        {"Method": method},
        {"Tutorials": [name for name in names if name.startswith("tutorials/")]},
        {"Study": [name for name in names if name.startswith("experiments/")]},
        {"Guide": "guide.ipynb"},
        {"Architecture": "architecture.ipynb"},
        {"Library": [{folder: pages} for folder, pages in folders.items()]},
        {"API": [f"api/{package}.md" for package in packages()]},
    ]


def on_config(config):
    config.nav = navigation()
    return config


def on_files(files, config):
    from mkdocs.structure.files import File

    for package, modules in packages().items():
        text = f"# facevae.{package}\n\n" + "\n\n".join(f"::: {module}" for module in modules)
        files.append(File.generated(config, f"api/{package}.md", content=text))
    return files


def on_page_content(html, page, files, **_):
    """Links between notebooks lead to their pages; what lies outside of them is named, not linked."""
    folder = posixpath.dirname(page.file.src_uri)

    def resolved(match):
        attributes, target, anchor = match.groups()
        path = posixpath.normpath(posixpath.join(folder, unquote(target)))
        if file := files.get_file_from_path(path):
            return f'<a{attributes}href="{file.url_relative_to(page.file)}{anchor or ""}"'
        if path.startswith("../") and (ROOT / "nbs" / path).exists():
            return f"<a{attributes}"
        return match[0]

    return LINK.sub(resolved, html) if page.file.src_uri.endswith(".ipynb") else html


def on_post_build(config):
    """Warn of every link within the site that leads nowhere: to no file, or to no such place in it."""
    site = Path(config.site_dir).resolve()
    texts = {path.resolve(): path.read_text("utf-8") for path in site.rglob("*.html")}
    places = {path: {place.lower() for place in PLACE.findall(text)} for path, text in texts.items()}
    for path, text in texts.items():
        for link in sorted(set(TARGET.findall(text))):
            target, _, anchor = unquote(link).partition("#")
            found = (path.parent / target.partition("?")[0]).resolve() if target else path
            if path.name == "404.html" or target.startswith("/"):
                continue
            if found.is_dir():
                found = found / "index.html"
            if not found.is_file():
                LOG.warning("%s leads to %s, which is not in the site", path.relative_to(site), link)
            elif anchor and found in places and anchor.lower() not in places[found]:
                LOG.warning("%s leads to %s: there is no such heading", path.relative_to(site), link)
