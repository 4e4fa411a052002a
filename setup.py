"""Builds the package from settings.ini, and ships the experiment notebooks inside it."""

import shutil
import sys
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_namespace_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]


class BuildWithNotebooks(build_py):
    """Papermill runs notebooks, so an installed library must carry those of the study and the explorer."""

    def run(self):
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / cfg["lib_path"] / "experiments"
        target.mkdir(parents=True, exist_ok=True)
        for notebook in sorted((here / "nbs" / "experiments").glob("*.ipynb")):
            shutil.copy2(notebook, target / notebook.name)


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license="Apache-2.0",
    keywords=cfg["keywords"],
    classifiers=[
        "Programming Language :: Python :: 3",
        "Framework :: Jupyter",
        "Intended Audience :: Science/Research",
    ],
    python_requires=f">={cfg['min_python']}",
    # Folders of data count as packages: setuptools warns of each that does not.
    packages=find_namespace_packages(include=["facevae", "facevae.*"]),
    # An editable install warns (8 lines) unless this is said; a wheel would lose its data files by it.
    package_dir={"": "."} if "editable_wheel" in sys.argv else {},
    include_package_data=True,
    install_requires=cfg["requirements"].split(),
    extras_require={
        extra: cfg[f"{extra}_requirements"].split()
        for extra in ("dev", "docs", "segformer", "video", "onnx", "align", "explore", "tensorboard")
    },
    entry_points={"console_scripts": cfg["console_scripts"].split()},
    cmdclass={"build_py": BuildWithNotebooks},
    zip_safe=False,
)
