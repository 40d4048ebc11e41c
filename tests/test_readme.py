"""What the README and the cards print works as printed."""

import re
import shlex
import warnings
from pathlib import Path

import pytest
import yaml

from raypkg.cli import main

ROOT = Path(__file__).parents[1]
FILES = [ROOT / "README.md", *sorted(ROOT.glob("raypkg/**/README.md"))]
NOT_OURS = ("transformers", "lightning", "accelerate")  # packages that a program needs and the project does not
PAGES = {str(file.relative_to(ROOT)): file.read_text() for file in FILES}


def blocks(language):
    """Return (page, block) of every block of a language that is not an excerpt."""
    pattern = re.compile(rf"```{language}\n(.*?)```", re.DOTALL)
    pairs = [(page, block) for page, text in PAGES.items() for block in pattern.findall(text)]
    return [(page, block) for page, block in pairs if "from . import" not in block]


def commands():
    """Return (page, command) of every command of effray."""
    lines = [(page, line) for page, block in blocks("sh") for line in block.replace("\\\n", "").splitlines()]
    parts = [(page, part.strip()) for page, line in lines for part in line.partition("#")[0].split("&&")]
    return [(page, part) for page, part in parts if part.startswith("effray") and "…" not in part]


@pytest.mark.parametrize(("page", "code"), blocks("python"), ids=lambda text: text.splitlines()[0][:40])
def test_programs_run(page, code, tmp_path, monkeypatch):
    theirs = [package for package in NOT_OURS if f"import {package}" in code or f", {package}" in code]
    for package in theirs:
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        if theirs:  # Lightning advises, and calls what is deprecated
            warnings.simplefilter("ignore")
        exec(compile(code, page, "exec"), {"__name__": "program"})


@pytest.mark.parametrize(("page", "command"), commands())
def test_commands_are_understood(page, command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*shlex.split(command)[1:], "--help"])
    assert ended.value.code in (0, None), capsys.readouterr().err


def test_links_lead_somewhere():
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page}: {target}"


def test_every_method_has_its_card():
    rooms = {folder.parent.name for folder in ROOT.glob("raypkg/methods/*/__init__.py")}
    assert {f"raypkg/methods/{room}/README.md" for room in rooms} <= PAGES.keys()


def test_the_manifest_has_the_fields_of_a_rayjob():
    """Names of ray.io/v1, of which these are required."""
    ((_, text),) = blocks("yaml")
    job = yaml.safe_load(text)
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob") and job["metadata"]["name"]
    assert set(job["spec"]) == {"entrypoint", "shutdownAfterJobFinishes", "rayClusterSpec"}
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert set(cluster) == {"rayVersion", "authOptions", "enableInTreeAutoscaling", "headGroupSpec", "workerGroupSpecs"}
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert set(groups[0]) == {"rayStartParams", "template"}
    assert set(groups[1]) == {"groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"}
    for group in groups:
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        for container in group["template"]["spec"]["containers"]:
            assert {"name", "image", "resources"} == set(container)
    module, *arguments = job["spec"]["entrypoint"].removeprefix("python -m ").split()
    assert (ROOT / "jobs" / f"{module.rpartition('.')[2]}.py").exists()
    with pytest.raises(SystemExit) as ended:
        main(["tune", *arguments, "--help"])
    assert ended.value.code in (0, None)


def test_they_are_found():
    assert len(blocks("python")) >= 4 and len(commands()) >= 20
