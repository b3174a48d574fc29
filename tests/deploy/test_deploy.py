"""deploy/ is checked by a linter for each kind of file, and speaks of metrics that there are."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.data import ROOT
from xverse.server.metrics import Metrics

yaml = pytest.importorskip("yaml")
DEPLOY = ROOT / "deploy"


def documents(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text("utf-8")))


def compose() -> dict[str, Any]:
    (found,) = documents(DEPLOY / "compose.yaml")
    services: dict[str, Any] = found["services"]
    return services


def manifest(kind: str) -> dict[str, Any]:
    found = documents(DEPLOY / "kubernetes" / "xverse.yaml")
    (one,) = [document for document in found if document["kind"] == kind]
    chosen: dict[str, Any] = one
    return chosen


def ran(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def tool(name: str) -> str:
    """A linter beside this Python, or in the path."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def test_the_dockerfile_passes_hadolint() -> None:
    ran(tool("hadolint"), str(DEPLOY / "Dockerfile"))


def test_compose_keeps_to_its_schema() -> None:
    words = ("--builtin-schema", "vendor.compose-spec", str(DEPLOY / "compose.yaml"))
    ran(tool("check-jsonschema"), *words)


def test_the_manifests_keep_to_kubernetes_schemas() -> None:
    ran(tool("kubernetes-validate"), "--strict", str(DEPLOY / "kubernetes" / "xverse.yaml"))


def test_images_have_exact_tags() -> None:
    images = re.findall(r"^FROM (\S+)", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    stages = {"base", "wheel"}
    images = [image for image in images if image not in stages]
    images += [service["image"] for service in compose().values()]
    pod = manifest("Deployment")["spec"]["template"]["spec"]
    images += [container["image"] for container in pod["containers"]]
    assert len(images) >= 6
    for image in images:
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+[\w.-]*", image), image


def test_nothing_runs_as_root_or_writes_where_it_runs() -> None:
    stages = re.split(r"^FROM ", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)[1:]
    for stage in stages[-2:]:  # cuda and cpu
        assert re.search(r"^USER 10001:10001$", stage, re.MULTILINE)
    for name, service in compose().items():
        assert int(service["user"].split(":")[0]) > 0, name
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
    pod = manifest("Deployment")["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    context = pod["containers"][0]["securityContext"]
    assert context["readOnlyRootFilesystem"] is True
    assert context["allowPrivilegeEscalation"] is False


def test_the_commands_are_flags_of_serve() -> None:
    from dataclasses import fields

    from xverse.verbs.serve import Config

    known = {field.name for field in fields(Config)}
    pod = manifest("Deployment")["spec"]["template"]["spec"]
    for words in (compose()["xverse"]["command"], pod["containers"][0]["args"]):
        flags = [word.removeprefix("--").split("=")[0] for word in words if word.startswith("--")]
        assert flags
        assert {flag.replace("-", "_") for flag in flags} <= known


def test_there_is_time_to_drain() -> None:
    pod = manifest("Deployment")["spec"]["template"]["spec"]
    (drain,) = [int(a.split("=")[1]) for a in pod["containers"][0]["args"] if "drain" in a]
    assert pod["terminationGracePeriodSeconds"] > drain
    service = compose()["xverse"]
    assert int(service["stop_grace_period"].rstrip("s")) > drain


def test_probes_ask_routes_without_a_key() -> None:
    from xverse.server.routes import ROUTES

    container = manifest("Deployment")["spec"]["template"]["spec"]["containers"][0]
    paths = {
        container[f"{probe}Probe"]["httpGet"]["path"]
        for probe in ("startup", "readiness", "liveness")
    }
    assert paths == {"/ready", "/health"}
    assert paths <= {route.path for route in ROUTES}


def metric_names() -> set[str]:
    """Every series that a server has, by the names that Prometheus gives them."""
    found: set[str] = set()
    for family in Metrics("m").registry.collect():
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}
        found |= {family.name + suffix for suffix in suffixes.get(family.type, [""])}
    return found


def expressions() -> list[str]:
    board = json.loads((DEPLOY / "grafana/dashboards/xverse.json").read_text())
    found = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    (rules,) = documents(DEPLOY / "prometheus" / "rules.yml")
    found += [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    return found


def test_dashboard_and_alerts_ask_for_metrics_that_there_are() -> None:
    asked = {name for expr in expressions() for name in re.findall(r"xverse:\w+", expr)}
    assert len(asked) > 12
    assert asked <= metric_names()


def test_every_query_is_promql() -> None:
    promql_parser = pytest.importorskip("promql_parser")
    for expr in expressions():
        promql_parser.parse(expr.replace("$__rate_interval", "1m").replace("$model", ".*"))


def test_the_list_of_metrics_is_complete() -> None:
    text = (ROOT / "docs" / "metrics.md").read_text("utf-8")
    listed = set(re.findall(r"^\| `(xverse:\w+)", text, re.MULTILINE))
    names = {re.sub(r"_(bucket|sum|count)$", "", name) for name in metric_names()}
    assert listed == names


def test_the_dashboard_can_be_provisioned() -> None:
    board = json.loads((DEPLOY / "grafana/dashboards/xverse.json").read_text())
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    (source,) = documents(DEPLOY / "grafana/provisioning/datasources/prometheus.yaml")
    uids = {panel["datasource"]["uid"] for panel in board["panels"]}
    assert uids == {source["datasources"][0]["uid"]}
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]]
    assert len(places) == len(set(places))
