"""The files under deploy/: what can be said of them without a container runtime or a cluster.

Kubernetes' own objects and every pod template are held against Kubernetes' schemas. KubeRay's objects are held against
the fields below, those of its API (v1) that are used here; its own validation and its operator are not run.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from typer.main import get_command

from autorank.cli import app
from autorank.config import SweepConfig

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
KUBERNETES = "1.31"
IMAGE = "autorank:0.1.0"

STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
COUNT = {"type": "integer", "minimum": 0}
POD = {"type": "object", "required": ["spec"]}


def _fields(required: list[str], **fields: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "required": required, "properties": fields}


CLUSTER = _fields(
    ["headGroupSpec"],
    rayVersion={"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
    suspend={"type": "boolean"},
    enableInTreeAutoscaling={"type": "boolean"},
    headGroupSpec=_fields(
        ["rayStartParams", "template"],
        serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
        enableIngress={"type": "boolean"},
        rayStartParams=STRINGS,
        template=POD,
    ),
    workerGroupSpecs={
        "type": "array",
        "items": _fields(
            ["groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"],
            groupName={"type": "string"},
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            numOfHosts=COUNT,
            rayStartParams=STRINGS,
            template=POD,
        ),
    },
)
KUBERAY = {
    "RayCluster": CLUSTER,
    "RayJob": _fields(
        ["entrypoint"],
        entrypoint={"type": "string"},
        runtimeEnvYAML={"type": "string"},
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode"]},
        metadata=STRINGS,
        backoffLimit=COUNT,
        activeDeadlineSeconds=COUNT,
        shutdownAfterJobFinishes={"type": "boolean"},
        ttlSecondsAfterFinished=COUNT,
        submitterPodTemplate=POD,
        rayClusterSpec=CLUSTER,
    ),
}


def _objects() -> dict[str, dict[str, Any]]:
    found = {}
    for path in sorted((DEPLOY / "kubernetes").glob("*.yaml")):
        for one in yaml.safe_load_all(path.read_text(encoding="utf-8")):
            found[f"{path.stem}/{one['kind']}-{one.get('metadata', {}).get('name', '')}"] = one
    return found


OBJECTS = _objects()
CORE = [name for name, one in OBJECTS.items() if "ray.io" not in one["apiVersion"] and one["kind"] != "Kustomization"]
RAY = [name for name, one in OBJECTS.items() if one["apiVersion"] == "ray.io/v1"]
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))


def templates(node: Any) -> Iterator[dict[str, Any]]:
    """Every pod template in an object."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("template", "submitterPodTemplate"):
                yield value
            else:
                yield from templates(value)
    elif isinstance(node, list):
        for value in node:
            yield from templates(value)


def pods(names: list[str]) -> Iterator[dict[str, Any]]:
    for name in names:
        for template in templates(OBJECTS[name]["spec"]):
            yield template["spec"]


@pytest.mark.parametrize("name", CORE)
def test_objects_of_kubernetes_fit_its_schemas(name: str) -> None:
    kubernetes_validate.validate(OBJECTS[name], KUBERNETES, strict=True)


@pytest.mark.parametrize("name", RAY)
def test_objects_of_kuberay_have_fields_that_it_knows_and_pods_that_kubernetes_takes(name: str) -> None:
    one = OBJECTS[name]
    jsonschema.validate(one["spec"], KUBERAY[one["kind"]])
    for pod in pods([name]):
        whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": pod}
        kubernetes_validate.validate(whole, KUBERNETES, strict=True)


@pytest.mark.parametrize(
    ("kind", "path", "wrong"),
    [
        ("RayCluster", ("headGroupSpec", "rayStartParams"), {"num-cpus": 0}),
        ("RayCluster", ("workerGroupSpec",), []),
        ("RayJob", ("submissionMode",), "Direct"),
    ],
    ids=["a number where KubeRay wants a text", "an unknown field", "an unknown value"],
)
def test_the_fields_of_kuberay_are_told_from_others(kind: str, path: tuple[str, ...], wrong: object) -> None:
    spec = yaml.safe_load(yaml.safe_dump(next(OBJECTS[name]["spec"] for name in RAY if OBJECTS[name]["kind"] == kind)))
    place = spec
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = wrong
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(spec, KUBERAY[kind])


def test_every_ray_process_takes_part_with_the_token_of_the_secret() -> None:
    for pod in pods(RAY):
        for container in pod["containers"]:
            given = {one["name"]: one for one in container["env"]}
            assert given["RAY_AUTH_MODE"]["value"] == "token"
            assert given["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": "ray-token", "key": "auth_token"}
    for name in ("head", "worker"):
        assert COMPOSE["services"][name]["environment"]["RAY_AUTH_MODE"] == "token"
        assert COMPOSE["services"][name]["secrets"] == ["ray_token"]


def test_all_nodes_share_the_volume_of_the_sweeps() -> None:
    claim = OBJECTS["storage/PersistentVolumeClaim-sweeps"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    nodes = [pod for pod in pods(RAY) if pod["containers"][0]["name"] in ("ray-head", "ray-worker")]
    assert len(nodes) == 4
    for pod in nodes:
        assert {"name": "sweeps", "persistentVolumeClaim": {"claimName": "sweeps"}} in pod["volumes"]
        assert {"name": "sweeps", "mountPath": "/sweeps"} in pod["containers"][0]["volumeMounts"]
    assert all(COMPOSE["services"][name]["volumes"] == ["sweeps:/sweeps"] for name in ("head", "worker"))


def test_names_lead_somewhere() -> None:
    claims = {one["metadata"]["name"] for one in OBJECTS.values() if one["kind"] == "PersistentVolumeClaim"}
    deployed = [name for name, one in OBJECTS.items() if one["kind"] == "Deployment"]
    for pod in pods([*deployed, *RAY]):
        volumes = {volume["name"] for volume in pod.get("volumes", [])}
        used = [volume["persistentVolumeClaim"]["claimName"] for volume in pod.get("volumes", []) if len(volume) == 2
                and "persistentVolumeClaim" in volume]  # fmt: skip
        assert set(used) <= claims
        for container in pod["containers"]:
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes
            assert container["image"] == IMAGE or not container["image"].startswith("autorank")
    for name in deployed:
        labels = OBJECTS[name]["spec"]["template"]["metadata"]["labels"]
        service = OBJECTS[name.replace("Deployment", "Service")]
        assert service["spec"]["selector"] == labels
        ports = {port["name"] for pod in pods([name]) for port in pod["containers"][0]["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    listed = set(OBJECTS["kustomization/Kustomization-"]["resources"])
    assert listed | {"kustomization.yaml", "rayjob.yaml"} == {p.name for p in (DEPLOY / "kubernetes").iterdir()}
    for name, service in COMPOSE["services"].items():
        assert set(service.get("depends_on", ())) <= set(COMPOSE["services"]), name
        assert set(service.get("secrets", ())) <= set(COMPOSE["secrets"]), name
        assert {place.partition(":")[0] for place in service.get("volumes", ())} <= set(COMPOSE["volumes"]), name


def test_nothing_holds_a_secret_and_compose_listens_on_this_machine_alone() -> None:
    for path in (file for file in DEPLOY.rglob("*") if file.is_file() and file.suffix != ".md"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"://[^/@\s]+:[^/@\s]+@", text), path
        assert "kind: Secret" not in text, path
        assert "disabled" not in text, path
    for service in COMPOSE["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


def test_the_versions_are_those_of_the_package() -> None:
    pins = dict(re.findall(r"^([\w.-]+)==(.+)$", (ROOT / "constraints.txt").read_text(), re.M))
    project = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{IMAGE.rpartition(":")[2]}"' in project
    for name in RAY:
        spec = OBJECTS[name]["spec"]
        assert spec.get("rayClusterSpec", spec)["rayVersion"] == pins["ray"]
    for line in re.findall(r"^COPY (.+) \S+$", (DEPLOY / "Containerfile").read_text(), re.M):
        assert all((ROOT / source).exists() for source in line.split())


def test_the_job_is_a_command_that_autorank_has() -> None:
    spec = OBJECTS["rayjob/RayJob-net"]["spec"]
    program, command, *arguments = shlex.split(spec["entrypoint"])
    assert program == "autorank"
    context = get_command(app).commands[command].make_context(command, arguments)  # type: ignore[attr-defined]
    SweepConfig(address=context.params["address"], sweep_dir=str(context.params["sweep_dir"]))
    assert str(context.params["sweep_dir"]).startswith("/sweeps/")
    assert "PYTHONPATH" in yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]
