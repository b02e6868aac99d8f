"""Versions stand in pyproject.toml alone; conda, make and CI point at it."""
import importlib.metadata
import os
import re
import subprocess
import tomllib

import pytest
import yaml
from conftest import PROJECT

PYPROJECT = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))
DEPENDENCIES = PYPROJECT["project"]["dependencies"]


def test_conda_takes_python_and_pip_and_everything_else_from_pyproject():
    environment = yaml.safe_load((PROJECT / "environment.yml").read_text(encoding="utf-8"))
    assert environment["name"] == PYPROJECT["project"]["name"]
    assert environment["channels"] == ["conda-forge", "nodefaults"]
    python, pip, packages = environment["dependencies"]
    assert (python, pip, packages) == ("python=3.11", "pip", {"pip": ["-e .[dev]"]})
    assert PYPROJECT["project"]["requires-python"] == ">=3.11" and "prefix" not in environment


@pytest.mark.parametrize("name", "torch transformers trl peft deepspeed accelerate datasets jieba".split())
def test_what_changes_results_with_every_release_is_pinned_exactly_and_installed_so(name):
    pin = next(line for line in DEPENDENCIES if re.split(r"[=<>]", line)[0] == name)
    assert pin == f"{name}=={importlib.metadata.version(name).partition('+')[0]}"


def test_no_other_file_states_a_version_of_torch():
    version = next(line for line in DEPENDENCIES if line.startswith("torch==")).removeprefix("torch==")
    for name in ("Makefile", "environment.yml", ".ci/run", "README.md", "README.zh.md"):
        assert version not in (PROJECT / name).read_text(encoding="utf-8"), name


def test_make_alone_lists_every_target_and_reads_torchs_pin_from_pyproject():
    listed = subprocess.run(["make"], cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"^make (\S+)", listed, re.MULTILINE) == "help env demo test test-slow lab notebooks".split()
    command = ["make", "-n", "-B", "env"]
    planned = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    assert "--no-deps" not in planned or next(line for line in DEPENDENCIES if line.startswith("torch==")) in planned


def test_ci_runs_what_the_readme_tells_people_to_run():
    script = PROJECT / ".ci/run"
    assert os.access(script, os.X_OK) and "make test" in script.read_text(encoding="utf-8")
    for name in ("README.md", "README.zh.md"):
        text = (PROJECT / name).read_text(encoding="utf-8")
        assert "make demo" in text and "make test" in text


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_a_readme_names_only_what_exists(name):
    text = (PROJECT / name).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (PROJECT / link).exists(), f"{name} links to {link}"
    import rlhfkit as rk
    for public in set(re.findall(r"\brk\.(\w+)", text)):
        assert public in rk.__all__, f"{name} names rk.{public}"
