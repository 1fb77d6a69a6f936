"""The files that people apply to clusters: against schemas, constraints and our own sources."""

import copy
import importlib.util
import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from jobs.cli import COMMANDS
from jobs.recipes import TRAINING
from jobs.submit import STOP_WAIT_S
from pipelines.tracker.credentials import credential_in, names_a_credential

ROOT = Path(__file__).parents[2]
KUBERNETES = sorted((ROOT / "cluster" / "kubernetes").glob("*.yaml"))
SCHEMAS = json.loads((Path(__file__).parent / "kubernetes_schemas.json").read_text())
PINNED = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if "==" in line and not line.startswith("#")
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def launcher() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster" / "aws.yaml").read_text())


def documents() -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"{file.name} {document['kind']} {document['metadata']['name']}", document)
        for file in KUBERNETES
        for document in yaml.safe_load_all(file.read_text())
    ]


def pods(node: Any) -> list[dict[str, Any]]:
    """Return every pod's spec in a document, wherever its template stands."""
    if isinstance(node, list):
        return [pod for item in node for pod in pods(item)]
    if not isinstance(node, dict):
        return []
    own = [node] if "containers" in node else []
    return own + [pod for value in node.values() for pod in pods(value)]


def all_pods() -> list[tuple[str, dict[str, Any]]]:
    return [(name, pod) for name, document in documents() for pod in pods(document)]


def check(document: dict[str, Any]) -> None:
    schema = {"$ref": f"#/definitions/{document['kind']}", "definitions": SCHEMAS["definitions"]}
    jsonschema.validate(document, schema, cls=jsonschema.Draft7Validator)


@pytest.mark.parametrize("name", [name for name, _ in documents()])
def test_kubernetes_files_follow_the_schemas(name: str) -> None:
    check(dict(documents())[name])


def test_the_schemas_refuse_what_kubernetes_would() -> None:
    cluster = dict(documents())["raycluster.yaml RayCluster vitok"]
    spec = cluster["spec"]["headGroupSpec"]["template"]["spec"]
    mistakes: list[tuple[dict[str, Any], str, Any]] = [
        (spec["containers"][0], "imagePullPolice", "Always"),
        (spec, "terminationGracePeriodSeconds", "soon"),
        (cluster["spec"]["autoscalerOptions"], "version", "v3"),
        (cluster["spec"]["workerGroupSpecs"][0], "groupname", "h200"),
        (cluster["spec"]["headGroupSpec"]["rayStartParams"], "num-cpus", 0),
    ]
    for place, key, value in mistakes:
        before = copy.deepcopy(place)
        place[key] = value
        with pytest.raises(jsonschema.ValidationError):
            check(cluster)
        place.clear()
        place.update(before)
    check(cluster)
    del cluster["spec"]["headGroupSpec"]["template"]
    with pytest.raises(jsonschema.ValidationError):
        check(cluster)


def test_the_launcher_file_follows_rays_own_schema() -> None:
    from ray.autoscaler._private.aws.config import _configure_from_network_interfaces
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(launcher())
    validate_config(config)
    # Raises where one of several network interfaces lacks a subnet or groups.
    _configure_from_network_interfaces(copy.deepcopy(config))
    broken = launcher() | {"max_worker": 3}
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config(broken))


def test_spot_falls_back_to_the_same_nodes_on_demand_in_one_placement_group() -> None:
    types = launcher()["available_node_types"]
    spot, on_demand = types["h200_spot"], types["h200_on_demand"]
    assert spot["node_config"].pop("InstanceMarketOptions")["MarketType"] == "spot"
    assert spot == on_demand
    assert spot["node_config"]["Placement"] == {"GroupName": "vitok-h200"}
    cards = spot["node_config"]["NetworkInterfaces"]
    assert [card["NetworkCardIndex"] for card in cards] == list(range(16)), "p5en has 16 EFA cards"
    assert cards[0]["DeviceIndex"] == 0 and {c["DeviceIndex"] for c in cards[1:]} == {1}
    assert {card["InterfaceType"][:3] for card in cards} == {"efa"}
    assert types["head"]["resources"] == {"CPU": 0}


def test_versions_are_those_of_the_constraints_and_of_the_project() -> None:
    versions = [
        spec["rayVersion"]
        for _, document in documents()
        for spec in (document.get("spec", {}), document.get("spec", {}).get("rayClusterSpec", {}))
        if "rayVersion" in spec
    ]
    assert versions == [PINNED["ray"]] * 2
    texts = [file.read_text() for file in (*KUBERNETES, ROOT / "cluster" / "aws.yaml")]
    images = [image for text in texts for image in re.findall(r"\bvitok:(\d+\.[\w.-]+)", text)]
    assert len(images) >= 8
    assert {image.removesuffix("-cpu") for image in images} == {PROJECT["version"]}
    others = [c["image"] for _, pod in all_pods() for c in pod["containers"]]
    assert all(re.search(r":v?\d", image) for image in others), "no image without a version"


def test_the_image_installs_the_constraints_and_copies_what_is_there() -> None:
    text = (ROOT / "cluster" / "Dockerfile").read_text()
    assert f"-t vitok:{PROJECT['version']} " in text
    installs = re.findall(r"pip install ([^&;\\\n]+)", text)
    assert installs and all("-c constraints.txt" in i or "--no-deps" in i for i in installs)
    for extra in re.findall(r'"\.\[(\w+)\]"', text):
        assert extra in PROJECT["optional-dependencies"]
    copied = [name for line in re.findall(r"^COPY (.+) \S+$", text, re.M) for name in line.split()]
    assert {"vitok", "pipelines", "jobs", "cluster"} <= set(copied)
    assert all((ROOT / name).exists() for name in copied)
    assert f"python:{PROJECT['requires-python'][2:6]}" in text


def test_entry_points_exist() -> None:
    (job,) = [document for _, document in documents() if document["kind"] == "RayJob"]
    program, command, recipe, *fields = shlex.split(job["spec"]["entrypoint"])
    assert program in PROJECT["scripts"] and command in COMMANDS and recipe in TRAINING
    assert "--data.manifest" in fields
    hooks = [
        container["lifecycle"]["preStop"]["exec"]["command"]
        for _, pod in all_pods()
        for container in pod["containers"]
        if "lifecycle" in container
    ]
    assert len(hooks) == 3, "every group of workers"
    started = [shlex.split(c) for c in launcher()["worker_start_ray_commands"] if " -m " in c]
    for words in (*hooks, *started):
        assert importlib.util.find_spec(words[words.index("-m") + 1]), words


def test_a_node_that_goes_has_the_time_that_a_checkpoint_has() -> None:
    for name, pod in all_pods():
        for container in pod["containers"]:
            if not container["name"].startswith("ray-"):
                continue
            assert pod["terminationGracePeriodSeconds"] >= STOP_WAIT_S + 60, name
            if hook := container.get("lifecycle"):
                words = hook["preStop"]["exec"]["command"]
                assert float(words[words.index("--deadline-s") + 1]) <= STOP_WAIT_S
    (job,) = [document for _, document in documents() if document["kind"] == "RayJob"]
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    environment = yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"]
    assert environment["RAY_JOB_STOP_WAIT_TIME_S"] == str(STOP_WAIT_S)


def test_every_server_has_probes_and_limits() -> None:
    checked = 0
    for name, pod in all_pods():
        for container in pod["containers"]:
            assert set(container["resources"]) == {"requests", "limits"}, name
            if "ports" in container:
                assert {"readinessProbe", "livenessProbe"} <= set(container), name
                checked += 1
    assert checked >= 8


def test_ray_asks_for_a_token_and_nothing_can_be_reached_from_outside() -> None:
    specs = [d["spec"] for _, d in documents() if d["kind"] in ("RayCluster", "RayJob")]
    clusters = [spec.get("rayClusterSpec", spec) for spec in specs]
    assert [cluster["authOptions"] for cluster in clusters] == [{"mode": "token"}] * 2
    policies = [d for _, d in documents() if d["kind"] == "NetworkPolicy"]
    assert any(
        policy["spec"]["podSelector"] == {} and "ingress" not in policy["spec"]
        for policy in policies
    ), "nothing is let in by default"
    services = [d["spec"] for _, d in documents() if d["kind"] == "Service"]
    assert services and all(spec.get("type", "ClusterIP") == "ClusterIP" for spec in services)
    assert not [d for _, d in documents() if d["kind"] == "Ingress"]
    config = launcher()
    (head,) = [c for c in config["head_start_ray_commands"] if "ray start" in c]
    assert "--dashboard-host=127.0.0.1" in head
    assert any("RAY_AUTH_MODE=token" in option for option in config["docker"]["run_options"])


def test_no_file_holds_a_credential() -> None:
    for file in sorted((ROOT / "cluster").rglob("*.*")):
        if file.suffix in (".yaml", ".json", ".md", "") or file.name == "Dockerfile":
            for number, line in enumerate(file.read_text().splitlines(), 1):
                assert credential_in(line) is None, f"{file.name}:{number}"
    literal = [
        variable["name"]
        for _, pod in all_pods()
        for container in pod["containers"]
        for variable in container.get("env", [])
        if "value" in variable and names_a_credential(variable["name"])
    ]
    assert literal == []
    mlflow = dict(all_pods())["mlflow.yaml Deployment mlflow"]["containers"][0]
    environment = {variable["name"]: variable for variable in mlflow["env"]}
    assert environment["PGPASSWORD"]["valueFrom"]["secretKeyRef"]["name"] == "mlflow-database"
    assert environment["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"]["value"] == "false"


def test_the_dashboard_draws_metrics_that_exist() -> None:
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    dashboard = json.loads((ROOT / "cluster" / "monitoring" / "vitok.json").read_text())
    drawn = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"\bray_\w+", target["expr"])
    }
    assert len(drawn) == len(dashboard["panels"]) + 1
    ours = {name for name in drawn if name.startswith("ray_vitok_")}
    # Those of training.md; that they are recorded is seen by the test of the whole stack.
    documented = (ROOT / "docs" / "training.md").read_text()
    for name in ours - {"ray_vitok_step", "ray_vitok_loss"}:
        assert f"`{name.removeprefix('ray_vitok_')}`" in documented, name
    rays = {f"ray_{name}" for name in METRICS_GAUGES} | {"ray_object_store_memory"}
    assert drawn - ours <= rays
