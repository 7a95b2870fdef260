"""The image, the compose file and the manifests of ``deploy/``: linted, as nothing is built or started here."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from client.bundles import CODE
from client.settings import SiteSettings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """Instructions of a Dockerfile with their arguments."""
    lines = [line for line in dockerfile.splitlines() if line and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in joined.splitlines()]


def faults(dockerfile: str) -> list[str]:
    """What is wrong with a Dockerfile."""
    steps = instructions(dockerfile)
    by_name = {name: [argument for each, argument in steps if each == name] for name, _ in steps}
    runs, everything = by_name["RUN"], "\n".join(argument for _, argument in steps)
    installs = [run for run in runs if "pip install" in run]
    rules = {
        "the base is pinned": all(re.fullmatch(r"[a-z/]+:[0-9][^ ]*", image) for image in by_name["FROM"]),
        "nothing is fetched by ADD": "ADD" not in by_name,
        "it ends as a user other than root": re.fullmatch("[1-9][0-9]*:[1-9][0-9]*", by_name.get("USER", [""])[-1]),
        "it has a command and a health check": {"CMD", "HEALTHCHECK"} <= set(by_name),
        "torch comes first": "^torch==" in installs[0],
        "all versions are those of the constraints": all("constraints.txt" in run for run in installs),
        "no cache is kept": all("--no-cache-dir" in run for run in installs),
        "no list of packages is kept": all("lists/*" in run for run in runs if "apt-get install" in run),
        "nothing else is fetched": not any(re.search("curl|wget|git clone|--trusted-host", run) for run in runs),
        "it names no secret": not re.search(r"secret|password|token|\.key|\.crt", everything),
    }
    return [rule for rule, holds in rules.items() if not holds]


BROKEN = [
    ("python:3.11-slim-bookworm", "python:latest"),
    ("python:3.11-slim-bookworm", "python"),
    ("COPY mcrage", "ADD mcrage"),
    ("USER 10001:10001", "USER root"),
    ("USER 10001:10001", ""),
    ("--constraint constraints.txt", ""),
    ("grep '^torch=='", "grep '^flwr=='"),
    ("rm -rf /var/lib/apt/lists/*", "true"),
    ("COPY constraints.txt ./", "COPY constraints.txt site.key ./"),
    ("HEALTHCHECK", "ONBUILD"),
]


@pytest.mark.parametrize(("old", "new"), BROKEN)
def test_the_image_is_pinned_constrained_without_root_and_without_secrets(old: str, new: str) -> None:
    text = (DEPLOY / "container/Dockerfile").read_text(encoding="utf-8")

    assert faults(text) == []
    assert old in text
    assert faults(text.replace(old, new)) != []


def test_the_image_holds_what_a_hospital_approves_and_the_build_sees_nothing_else() -> None:
    text = (DEPLOY / "container/Dockerfile").read_text(encoding="utf-8")
    ignored = (DEPLOY / "container/Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    copied = {word for name, argument in instructions(text) if name == "COPY" for word in argument.split()[:-1]}
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["flwr"]["app"]

    assert next(line for line in ignored if not line.startswith("#")) == "*"
    assert {line[1:] for line in ignored if line.startswith("!")} == copied
    assert {*(part.rstrip("/") for part in CODE), *(each.split("/")[0] for each in settings["fab-include"])} <= copied
    assert all((ROOT / each).exists() for each in copied)


SERVICE_KEYS = frozenset(
    ("image", "init", "read_only", "tmpfs", "cap_drop", "security_opt", "restart", "stop_grace_period", "logging")
) | {"command", "environment", "healthcheck", "mem_limit", "pids_limit", "profiles", "network_mode", "networks"}


def compose() -> dict[str, Any]:
    """The compose file with its anchors put in."""
    content = yaml.safe_load((DEPLOY / "container/compose.yaml").read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def mounts(service: dict[str, Any]) -> dict[str, str]:
    """Where a service has which volume or folder."""
    return {each.split(":")[1]: each.split(":")[0] for each in service.get("volumes", [])}


def test_every_container_is_closed_and_everything_that_it_names_is_there() -> None:
    content = compose()

    assert len(content["services"]) == 7
    for service in content["services"].values():
        assert not set(service) - SERVICE_KEYS - {"volumes", "secrets", "ports"}
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert re.fullmatch(r"mcrage:[0-9.]+", service["image"])
        assert set(service.get("networks", [])) <= set(content["networks"])
        named = {source for source in mounts(service).values() if not source.startswith(".")}
        assert named <= set(content["volumes"])
        assert {each["source"] for each in service.get("secrets", [])} <= set(content["secrets"])
        assert service["command"][:2] == ["python", "-m"]
        assert (ROOT / service["command"][2] / "__main__.py").is_file()
    assert [name for name, service in content["services"].items() if "ports" in service] == ["coordinator"]


@pytest.mark.parametrize("site", ["site-01", "site-02"])
def test_of_a_hospitals_containers_one_has_the_keys_and_the_other_the_data(site: str) -> None:
    content = compose()
    network, data, admin = (content["services"][f"{site}-{part}"] for part in ("network", "data", "admin"))

    assert set(mounts(network)) == {"/etc/mcrage", "/var/lib/mcrage/keys"}
    assert set(mounts(data)) == {"/etc/mcrage", "/data", "/var/lib/mcrage/private"}
    assert data["network_mode"] == f"service:{site}-network"
    assert network["networks"] == [site]
    assert content["networks"][site] == {"internal": True}
    assert admin["network_mode"] == "none"
    for service in (network, data):
        assert f"./sites/{site}/config:/etc/mcrage:ro" in service["volumes"]
        assert service["secrets"] == [{"source": f"{site}-runtime", "target": "runtime.secret"}]
    assert f"./sites/{site}/data:/data:ro" in data["volumes"]
    assert (network["command"][-1], data["command"][-1]) == ("network", "data")


def test_the_settings_for_containers_fit_their_volumes_and_are_those_of_the_manifests(tmp_path: Path) -> None:
    files = {
        "compose": (DEPLOY / "container/site.toml").read_text(encoding="utf-8"),
        "kubernetes": named(manifests("site.yaml"), "ConfigMap", "site")["data"]["site.toml"],
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        (tmp_path / name).chmod(0o600)
    one, other = (SiteSettings.load(tmp_path / name) for name in files)
    services = compose()["services"]

    assert one.site == other.site
    assert one.daemon == other.daemon
    assert one.server.model_copy(update={"address": other.server.address}) == other.server
    assert f"{one.daemon.port}" == services["site-01-network"]["environment"]["MCRAGE_PORT"]
    for part, paths in {
        "network": (one.server.key, one.server.node_key, one.server.certificate, one.server.ca, one.daemon.approved),
        "data": (one.site.data, one.site.schema_file, one.site.private, one.daemon.approved),
    }.items():
        places = [Path(place) for place in mounts(services[f"site-01-{part}"])]
        assert all(any(place in path.parents for place in places) for path in paths)
    assert one.daemon.secret == Path("/run/secrets/runtime.secret")


def manifests(name: str) -> list[dict[str, Any]]:
    """The objects of a file."""
    return [each for each in yaml.safe_load_all((DEPLOY / "kubernetes" / name).read_text(encoding="utf-8")) if each]


def named(objects: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    """One of them."""
    [found] = [each for each in objects if each["kind"] == kind and each["metadata"]["name"] == name]
    return found


def gaps(objects: list[dict[str, Any]]) -> list[str]:
    """What leaves a pod open, or is named and not there."""
    found: list[str] = []
    claims = {each["metadata"]["name"] for each in objects if each["kind"] == "PersistentVolumeClaim"}
    policies = [each["spec"] for each in objects if each["kind"] == "NetworkPolicy"]
    for workload in (each for each in objects if each["kind"] in ("Deployment", "StatefulSet")):
        name, template = workload["metadata"]["name"], workload["spec"]["template"]
        pod, labels = template["spec"], template["metadata"]["labels"].items()
        context = pod.get("securityContext", {})
        if not (context.get("runAsNonRoot") and context.get("runAsUser") and "seccompProfile" in context):
            found.append(f"{name}: may run as root")
        if pod.get("serviceAccountName") in (None, "default") or pod.get("automountServiceAccountToken") is not False:
            found.append(f"{name}: has a token of the cluster")
        if any(pod.get(key) for key in ("hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace")):
            found.append(f"{name}: shares the host's namespaces")
        volumes = {each["name"]: each for each in pod["volumes"]}
        found += [f"{name}: hostPath" for each in volumes.values() if "hostPath" in each]
        claimed = {v["persistentVolumeClaim"]["claimName"] for v in volumes.values() if "persistentVolumeClaim" in v}
        found += [f"{name}: no claim {each}" for each in claimed - claims]
        selecting = [p for p in policies if p["podSelector"].get("matchLabels", {}).items() <= labels]
        if {kind for policy in selecting for kind in policy["policyTypes"]} != {"Ingress", "Egress"}:
            found.append(f"{name}: no NetworkPolicy selects it both ways")
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            found += [f"{name}: {fault}" for fault in _of_container(container, set(volumes))]
    return found


def _of_container(container: dict[str, Any], volumes: set[str]) -> Iterator[str]:
    context, name = container.get("securityContext", {}), container["name"]
    if context.get("readOnlyRootFilesystem") is not True or context.get("allowPrivilegeEscalation") is not False:
        yield f"{name} can write its image or gain rights"
    if context.get("capabilities") != {"drop": ["ALL"]}:
        yield f"{name} has capabilities"
    if set(container.get("resources", {}).get("limits", {})) != {"cpu", "memory"}:
        yield f"{name} has no limits"
    if not {each["name"] for each in container["volumeMounts"]} <= volumes:
        yield f"{name} mounts what is not there"
    if container["image"].endswith(":latest") or ":" not in container["image"]:
        yield f"{name} is of any version"
    if any("value" in each and "secret" in each["name"].lower() for each in container.get("env", [])):
        yield f"{name} has a secret in its environment"


OPENED = [
    ("runAsNonRoot: true", "runAsNonRoot: false"),
    ("readOnlyRootFilesystem: true", "readOnlyRootFilesystem: false"),
    ("automountServiceAccountToken: false\n      enable", "automountServiceAccountToken: true\n      enable"),
    ("policyTypes: [Ingress, Egress]", "policyTypes: [Ingress]"),
    ("drop: [ALL]", "drop: []"),
    ("allowPrivilegeEscalation: false", "allowPrivilegeEscalation: true"),
]


@pytest.mark.parametrize("name", ["coordinator.yaml", "site.yaml"])
def test_the_pods_are_closed(name: str) -> None:
    text = (DEPLOY / "kubernetes" / name).read_text(encoding="utf-8")

    assert gaps(manifests(name)) == []
    for old, new in [*OPENED, ("      volumes:\n", "      hostPID: true\n      volumes:\n")]:
        assert old in text
        assert gaps(list(yaml.safe_load_all(text.replace(old, new)))) != [], old
    assert manifests(name)[0]["metadata"]["labels"] == {"pod-security.kubernetes.io/enforce": "restricted"}


def test_no_secret_stands_in_a_manifest() -> None:
    for name in ("coordinator.yaml", "site.yaml"):
        assert not [each for each in manifests(name) if each["kind"] == "Secret"]
        assert "BEGIN" not in (DEPLOY / "kubernetes" / name).read_text(encoding="utf-8")


def test_a_hospitals_pod_parts_keys_from_data_and_reaches_the_coordinator_alone() -> None:
    objects = manifests("site.yaml")
    containers = named(objects, "Deployment", "site")["spec"]["template"]["spec"]["containers"]
    network, data = ({each["name"] for each in container["volumeMounts"]} for container in containers)
    policy = named(objects, "NetworkPolicy", "site")["spec"]

    assert {"keys", "data", "private"} & network == {"keys"}
    assert {"keys", "data", "private"} & data == {"data", "private"}
    assert policy["podSelector"] == {}
    assert policy["ingress"] == []
    address, names = policy["egress"]
    assert address["to"][0]["ipBlock"]["cidr"].endswith("/32")
    assert [each["port"] for each in address["ports"]] == [8443]
    assert {each["port"] for each in names["ports"]} == {53}
    assert named(manifests("coordinator.yaml"), "NetworkPolicy", "coordinator")["spec"]["egress"] == []
