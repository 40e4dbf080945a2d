"""Install scaledreamer. Everything that may change is in settings.ini, which nbdev reads too."""

import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
settings = ConfigParser(delimiters=["="])
settings.read(here / "settings.ini", encoding="utf-8")
cfg = settings["DEFAULT"]
repository = f"https://github.com/{cfg['user']}/{cfg['repo']}"
lab = cfg["lab_requirements"].split()


class BuildWithNotebooks(build_py):
    "Puts nbs/ into a wheel, from where `scaledreamer lab` copies it to the user."

    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # which has nbs/ itself
            target = Path(self.build_lib) / "scaledreamer/assets/notebooks"
            hidden = shutil.ignore_patterns(".*", "__pycache__")
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(here / cfg["nbs_path"], target, ignore=hidden)


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    license="Apache-2.0",
    url=repository,
    project_urls={
        "Source": repository,
        "Changelog": f"{repository}/blob/main/CHANGELOG.md",
        "Paper": "https://arxiv.org/abs/2407.02040",
    },
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=["scaledreamer", "scaledreamer.*"]),
    cmdclass={"build_py": BuildWithNotebooks},
    package_data={"scaledreamer": ["assets/**/*", "py.typed"]},
    install_requires=[*cfg["requirements"].split(), *lab],
    extras_require={
        "lab": lab,
        "texture": cfg["texture_requirements"].split(),
        "lpips": cfg["lpips_requirements"].split(),
        "search": cfg["search_requirements"].split(),
        "openvino": cfg["openvino_requirements"].split(),
        "tracking": cfg["tracking_requirements"].split(),
        "dev": cfg["dev_requirements"].split(),
    },
    entry_points={
        "console_scripts": ["scaledreamer = scaledreamer.commands.main:main"],
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"],
    },
    zip_safe=False,
)
