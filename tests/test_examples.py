"""Examples fit what they are examples of: commands, settings, files and ports."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

import pytest
import torch
import yaml

from vllm_budgetdraft.cli import main
from vllm_budgetdraft.config import (
    BUILT_IN_POLICIES,
    EvictionSettings,
    parse_speculative_config,
)
from vllm_budgetdraft.eviction.base import PromptStates, check_selection
from vllm_budgetdraft.eviction.catalogue import make_policy
from vllm_budgetdraft.vllm_integration.compatibility import NEWEST, OLDEST
from vllm_budgetdraft.vllm_integration.metrics.statistics import (
    COUNTERS,
    GAUGES,
    HISTOGRAMS,
    LABELLED_COUNTERS,
)

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.sh"))
PROGRAMS = sorted(EXAMPLES.glob("*.py"))
YAML_FILES = sorted([*EXAMPLES.rglob("*.yaml"), *EXAMPLES.rglob("*.yml")])
#: What a script is given, beside a folder of its own to work in.
VARIABLES = {
    "tensor_parallel.sh": {"TARGET": "/target", "DRAFTER": "/drafter"},
    "train_a_chat_drafter.sh": {"TARGET": "/target"},
}
ARGUMENTS = {
    "train.sh": ["novel.txt", "out"],
    "train_a_chat_drafter.sh": ["novel.txt", "out"],
    "compare_policies.sh": ["out"],
}
#: Takes the place of a command, and writes down how it was called.
STAND_IN = f"""#!{sys.executable}
import json, os, sys
with open(os.environ["CALLS"], "a") as file:
    print(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]), file=file)
"""


def name_of(path: Path) -> str:
    return str(path.relative_to(EXAMPLES))


def read(name: str) -> str:
    return (EXAMPLES / name).read_text(encoding="utf-8")


def read_yaml(name: str) -> Any:
    return yaml.safe_load(read(name))


@cache
def commands_of(script: str) -> list[list[str]]:
    """The commands of ours and vLLM's that a script runs, in its own words."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        for command in ("vllm", "budgetdraft"):
            (folder / command).write_text(STAND_IN)
            (folder / command).chmod(0o755)
        (folder / "novel.txt").write_text("It was a dark night.\n" * 20)
        calls = folder / "calls"
        subprocess.run(
            ["bash", EXAMPLES / script, *ARGUMENTS.get(script, [])],
            cwd=folder,
            env=os.environ
            | VARIABLES.get(script, {})
            | {
                "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
                "CALLS": str(calls),
            },
            check=True,
            stdout=subprocess.DEVNULL,
        )
        return [json.loads(line) for line in calls.read_text().splitlines()]


def with_defaults(text: str) -> str:
    """``${NAME:-default}`` as Compose reads it where NAME is not set."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


@cache
def servers() -> dict[str, list[str]]:
    """Arguments of every ``vllm serve`` of the examples, by their file."""
    found = {
        script.name: arguments
        for script in SCRIPTS
        for command, *arguments in commands_of(script.name)
        if command == "vllm"
    }
    service = read_yaml("docker/compose.yaml")["services"]["vllm"]
    found["docker/compose.yaml"] = ["serve", *map(with_defaults, service["command"])]
    found["kubernetes/deployment.yaml"] = ["serve", *container()["args"]]
    return found


def container() -> dict[str, Any]:
    deployment = read_yaml("kubernetes/deployment.yaml")
    (found,) = deployment["spec"]["template"]["spec"]["containers"]
    return found


def port_of(arguments: list[str]) -> int:
    joined = " ".join(arguments)
    (port,) = re.findall(r"--port[= ](\d+)", joined)
    return int(port)


def speculative_configs() -> Iterator[tuple[str, str]]:
    """Those of the commands, and those that headers show."""
    for name, arguments in servers().items():
        yield name, arguments[arguments.index("--speculative-config") + 1]
    for path in [*EXAMPLES.rglob("*.md"), *PROGRAMS, EXAMPLES / "docker/Dockerfile"]:
        text = re.sub(r"^# ?", "", path.read_text(encoding="utf-8"), flags=re.M)
        for found in re.findall(r"\{\s*\"method\": \"budgetdraft\"[^'}]*\}", text):
            if "(" not in found:  # else it is Python
                yield name_of(path), found


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_scripts_are_sound(script: Path) -> None:
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
    if shellcheck := shutil.which("shellcheck"):
        subprocess.run([shellcheck, script], check=True)


@pytest.mark.parametrize("program", PROGRAMS, ids=name_of)
def test_programs_compile(program: Path) -> None:
    compile(program.read_text(encoding="utf-8"), program, "exec")


def test_the_chat_explains_itself() -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / "chat.py", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    for option in ("--base-url", "--model", "--kv-budget"):
        assert option in done.stdout


@pytest.mark.parametrize("num_tokens", [1, 63, 64, 65, 100, 1000])
def test_the_custom_policy_keeps_what_a_policy_may(num_tokens, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    settings = EvictionSettings(eviction_policy="custom_policy:EveryNth")
    states = PromptStates(torch.zeros(2, 3, num_tokens, 4))
    kept = make_policy(settings).select(states, 64)
    check_selection(kept, states, 64)
    assert kept.shape[-1] == min(64, num_tokens)
    gaps = kept[0, 0].diff()
    assert (gaps[: settings.sink_tokens - 1] == 1).all()
    assert gaps[gaps > 1].unique().numel() <= 2, "evenly spaced"


@pytest.mark.parametrize("path", YAML_FILES, ids=name_of)
def test_yaml_parses(path: Path) -> None:
    assert list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def test_speculative_configs_are_valid() -> None:
    found = list(speculative_configs())
    for name, text in found:
        settings = json.loads(text)
        assert settings.pop("method") == "budgetdraft", name
        parse_speculative_config(settings)
    assert {name for name, _ in found} == {
        *("serve.sh", "tensor_parallel.sh", "custom_policy.py"),
        *("docker/Dockerfile", "docker/compose.yaml", "kubernetes/deployment.yaml"),
    }


@pytest.mark.parametrize(
    "script", ["train.sh", "train_a_chat_drafter.sh", "compare_policies.sh"]
)
def test_our_command_line_takes_the_commands(script, tmp_path, monkeypatch) -> None:
    from vllm_budgetdraft import generation
    from vllm_budgetdraft.comparison import evaluate
    from vllm_budgetdraft.training import __main__ as training

    class Enough(BaseException):
        """Which no command takes for a mistake of its user."""

    taken = []

    def stop(*_: Any) -> NoReturn:
        raise Enough

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generation, "run", taken.append)
    monkeypatch.setattr(evaluate, "run", taken.append)
    # The first thing that training does with options that it has read.
    monkeypatch.setattr(training, "read_target", stop)
    for command, *arguments in commands_of(script):
        assert command == "budgetdraft"
        if arguments[0] == "train":
            with pytest.raises(Enough):
                main(arguments)
        else:
            main(arguments)
    assert len(taken) == (1 if script == "compare_policies.sh" else 2)
    if script == "compare_policies.sh":
        assert set(taken[0].eviction_policies) == set(BUILT_IN_POLICIES)


def test_images_have_a_vllm_that_is_supported() -> None:
    (of_image,) = re.findall(r"ARG VLLM_VERSION=v(\S+)", read("docker/Dockerfile"))
    (image,) = read_yaml("kubernetes/kustomization.yaml")["images"]
    for version in (of_image, image["newTag"].removeprefix("v")):
        assert OLDEST <= tuple(map(int, version.split(".")[:2])) <= NEWEST
    assert container()["image"] == image["name"]


def test_compose_is_of_one_piece() -> None:
    services = read_yaml("docker/compose.yaml")["services"]
    folder = EXAMPLES / "docker"
    build = services["vllm"]["build"]
    assert (folder / build["context"] / build["dockerfile"]).is_file()
    mounted = {}
    for service in services.values():
        for volume in service["volumes"]:
            source, target, mode = with_defaults(volume).split(":")
            assert (folder / source).exists(), source
            assert mode == "ro"
            mounted[target] = folder / source

    # What is named by its place in a container is mounted there.
    command = servers()["docker/compose.yaml"]
    assert (mounted["/models"] / Path(command[1]).name).is_dir()
    template = next(each for each in command if each.startswith("--chat-template"))
    assert template.partition("=")[2] in mounted
    (provider,) = read_yaml("monitoring/dashboards.yml")["providers"]
    dashboards = mounted[provider["options"]["path"]]
    assert json.loads((dashboards / "budgetdraft.json").read_text(encoding="utf-8"))

    # Who asks whom, at which port.
    port = port_of(command)
    assert services["vllm"]["ports"] == [f"127.0.0.1:{port}:{port}"]
    assert f"localhost:{port}/health" in services["vllm"]["healthcheck"]["test"][-1]
    (job,) = read_yaml("monitoring/prometheus.yml")["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"vllm:{port}"]}]
    assert port_of(servers()["serve.sh"]) == port
    assert f"http://localhost:{port}/v1" in read("chat.py")
    (source,) = read_yaml("monitoring/datasources.yml")["datasources"]
    host, own_port = source["url"].removeprefix("http://").split(":")
    assert services[host]["ports"] == [f"127.0.0.1:{own_port}:{own_port}"]


def test_the_dashboard_shows_metrics_that_there_are() -> None:
    dashboard = json.loads(read("monitoring/grafana/budgetdraft.json"))
    queries = [t["expr"] for panel in dashboard["panels"] for t in panel["targets"]]
    ours = {name for q in queries for name in re.findall(r"vllm_budgetdraft:(\w+)", q)}
    counters = {**COUNTERS, **LABELLED_COUNTERS}
    buckets = {f"{name}_bucket" for name in HISTOGRAMS}
    assert ours == {*GAUGES, *buckets, *(f"{name}_total" for name in counters)}
    (source,) = read_yaml("monitoring/datasources.yml")["datasources"]
    default = dashboard["templating"]["list"][0]["current"]
    assert default == {"text": source["name"], "value": source["uid"]}


def test_kubernetes_is_of_one_piece() -> None:
    port = port_of(servers()["kubernetes/deployment.yaml"])
    assert container()["ports"] == [{"name": "http", "containerPort": port}]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container()[probe]["httpGet"] == {"path": "/health", "port": "http"}
    template = read_yaml("kubernetes/deployment.yaml")["spec"]["template"]
    service = read_yaml("kubernetes/service.yaml")
    assert service["spec"]["ports"] == [
        {"name": "http", "port": port, "targetPort": "http"}
    ]
    assert service["spec"]["selector"] == template["metadata"]["labels"]
    monitor = read_yaml("kubernetes/servicemonitor.yaml")["spec"]
    assert monitor["selector"]["matchLabels"] == service["metadata"]["labels"]
    (endpoint,) = monitor["endpoints"]
    (job,) = read_yaml("monitoring/prometheus.yml")["scrape_configs"]
    assert (endpoint["port"], endpoint["path"]) == ("http", job["metrics_path"])
    # The operator names a job after its service.
    assert service["metadata"]["name"] == job["job_name"]
    mounts = {mount["name"] for mount in container()["volumeMounts"]}
    assert mounts == {volume["name"] for volume in template["spec"]["volumes"]}


@pytest.mark.parametrize("folder", ["kubernetes", "monitoring"])
def test_kustomize_finds_its_files(folder: str) -> None:
    root = EXAMPLES / folder
    kustomization = read_yaml(f"{folder}/kustomization.yaml")
    for name in kustomization.get("resources", []):
        path = root / name
        assert path.is_file() or (path / "kustomization.yaml").is_file(), name
    for generator in kustomization.get("configMapGenerator", []):
        for name in generator["files"]:
            # kustomize reads no file outside of its folder.
            assert (root / name).resolve().is_relative_to(root)
            assert (root / name).is_file(), name


def test_the_build_gets_what_it_needs() -> None:
    lines = read("docker/Dockerfile.dockerignore").splitlines()
    kept = {line[1:] for line in lines if line.startswith("!")}
    for name in kept:
        assert (EXAMPLES.parent / name).exists(), name
    assert kept >= {"LICENSE", "README.md", "pyproject.toml", "setup.py"}


def test_the_readme_lists_every_example() -> None:
    listed = set(re.findall(r"^\| \[`([^`]+)`\]\(\1\)", read("README.md"), flags=re.M))
    there = {path.name + "/" * path.is_dir() for path in EXAMPLES.iterdir()}
    assert listed == {name for name in there if not name.startswith(("README", "__"))}
