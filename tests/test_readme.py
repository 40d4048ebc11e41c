"""What the README prints works as printed."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from raypkg.cli import main

TEXT = (Path(__file__).parents[1] / "README.md").read_text()
PROGRAMS = [code for code in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL) if "from . import" not in code]
COMMANDS = [
    command.strip()
    for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
    for line in block.replace("\\\n", "").splitlines()
    for command in line.partition("#")[0].split("&&")
    if command.strip().startswith("effray") and "…" not in command
]


@pytest.mark.parametrize("code", PROGRAMS, ids=lambda code: code.splitlines()[0][:40])
def test_programs_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*shlex.split(command)[1:], "--help"])
    assert ended.value.code in (0, None), capsys.readouterr().err


def test_the_manifest_has_the_fields_of_a_rayjob():
    """Names of ray.io/v1, of which these are required."""
    (text,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    job = yaml.safe_load(text)
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob") and job["metadata"]["name"]
    assert set(job["spec"]) == {"entrypoint", "shutdownAfterJobFinishes", "rayClusterSpec"}
    cluster = job["spec"]["rayClusterSpec"]
    assert set(cluster) == {"rayVersion", "enableInTreeAutoscaling", "headGroupSpec", "workerGroupSpecs"}
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert set(groups[0]) == {"rayStartParams", "template"}
    assert set(groups[1]) == {"groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"}
    for group in groups:
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        for container in group["template"]["spec"]["containers"]:
            assert {"name", "image", "resources"} == set(container)
    module, *arguments = job["spec"]["entrypoint"].removeprefix("python -m ").split()
    assert (Path(__file__).parents[1] / "jobs" / f"{module.rpartition('.')[2]}.py").exists()
    with pytest.raises(SystemExit) as ended:
        main(["tune", *arguments, "--help"])
    assert ended.value.code in (0, None)


def test_they_are_found():
    assert len(PROGRAMS) >= 3 and len(COMMANDS) >= 12
