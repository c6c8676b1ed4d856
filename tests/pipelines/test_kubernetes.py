"""What is shipped for Kubernetes is taken there whole, agrees with itself and runs our commands."""

import copy
import datetime as dt
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from apache_beam.options.pipeline_options import (
    FlinkRunnerOptions,
    PortableOptions,
    StandardOptions,
)

import pipelines
from feature_jobs.schemas import GateRefused, OperatorError
from pipelines.cli import cli
from pipelines.config import Settings, load_settings
from pipelines.running import runners
from pipelines.running.beam_options import pipeline_options
from pipelines.stages import NIGHT
from tests.support import manifests
from tests.support.manifests import Manifest, faults
from tests.test_docs import parse

FOLDER = Path(pipelines.__file__).parent / "configs/kubernetes"
DOCKERFILE = (Path(pipelines.__file__).parents[1] / "Dockerfile").read_text()
FILES = {path.name: manifests.read(path) for path in FOLDER.iterdir()}
ALL = [manifest for found in FILES.values() for manifest in found]


def named(kind: str, name: str) -> Manifest:
    (found,) = (m for m in ALL if m["kind"] == kind and m["metadata"].get("name") == name)
    return found


def every(key: str, inside: Any) -> Iterator[Any]:
    """Yields what stands under `key`, anywhere in a manifest."""
    if isinstance(inside, dict):
        if key in inside:
            yield inside[key]
        for value in inside.values():
            yield from every(key, value)
    elif isinstance(inside, list):
        for value in inside:
            yield from every(key, value)


CLUSTER = named("FlinkDeployment", "courier")
GPU = named("FlinkDeployment", "courier-gpu")
JOB_SERVER = named("Deployment", "courier-job-server")
SETTINGS = named("ConfigMap", "courier-settings")["data"]["courier.toml"]
NIGHTLY = named("CronJob", "courier-night")["spec"]["jobTemplate"]["spec"]
(DAYS,) = (m["spec"] for m in FILES["days.yaml"])


def only_container(manifest: Manifest) -> dict[str, Any]:
    (container,) = manifest["template"]["spec"]["containers"]
    return container


# ---- Taken whole -----------------------------------------------------------------------------


def test_the_files_hold_these() -> None:
    kinds = {name: [manifest["kind"] for manifest in found] for name, found in FILES.items()}
    assert kinds == {
        "cluster.yaml": ["PersistentVolumeClaim", "FlinkDeployment", "Deployment", "Service"],
        "days.yaml": ["Job"],
        "gpu.yaml": ["FlinkDeployment"],
        "nights.yaml": ["ConfigMap", "CronJob"],
    }


@pytest.mark.parametrize("file", sorted(FILES))
def test_kubernetes_and_the_operator_of_flink_take_all_that_stands_there(file: str) -> None:
    for manifest in FILES[file]:
        assert faults(manifest) == []


def test_the_page_names_the_files_and_the_versions_that_they_are_checked_for() -> None:
    page = (Path(pipelines.__file__).parent / "docs/flink.md").read_text()
    assert re.findall(r"^\| `(\w+\.yaml)` \|", page, re.MULTILINE) == [
        "cluster.yaml", "gpu.yaml", "nights.yaml", "days.yaml",
    ]  # fmt: skip
    operator = re.search(r"operator-api-(\d+\.\d+)", manifests.SCHEMA.read_text())[1]
    told = f"operator {operator} or later and Kubernetes {manifests.VERSIONS[0]} or later"
    assert told in " ".join(page.split())


POD = ("spec", "taskManager", "podTemplate", "spec")


@pytest.mark.parametrize(
    ("manifest", "at", "change"),
    [
        (CLUSTER, ("spec",), {"taskManagers": {}}),
        (CLUSTER, ("spec",), {"flinkVersion": "v1_9"}),
        (CLUSTER, ("spec", "flinkConfiguration"), {"taskmanager.numberOfTaskSlots": 1}),
        (CLUSTER, ("spec", "taskManager", "resource"), {"memmory": "4096m"}),
        (CLUSTER, ("spec", "taskManager", "resource"), {"cpu": "1"}),
        (CLUSTER, (), {"apiVersion": "flink.apache.org/v1"}),
        (GPU, POD, {"toleration": []}),
        (GPU, (*POD, "initContainers", 0), {"restartpolicy": "Always"}),
        (GPU, (*POD, "initContainers", 0, "resources"), {"limit": {}}),
        (JOB_SERVER, ("spec",), {"replica": 1}),
        (JOB_SERVER, ("spec",), {"replicas": "one"}),
        (named("Service", "courier-job-server"), ("spec", "ports", 0), {"target": 8099}),
        (named("PersistentVolumeClaim", "courier-shop"), ("spec",), {"storageClass": "x"}),
        (FILES["days.yaml"][0], ("spec",), {"backoff": 3}),
        (named("CronJob", "courier-night"), ("spec",), {"timezone": "Etc/UTC"}),
    ],
)
def test_a_field_that_is_misspelt_or_of_another_type_is_found(
    manifest: Manifest, at: tuple[str | int, ...], change: dict[str, Any]
) -> None:
    changed = copy.deepcopy(manifest)
    inside: Any = changed
    for key in at:
        inside = inside[key]
    inside.update(change)
    (name,) = change
    assert any(name in fault for fault in faults(changed))


def test_the_operators_schema_is_trimmed_to_what_a_user_writes() -> None:
    spec = {
        "description": "long",
        "properties": {
            "podTemplate": {"properties": {"spec": {}}},
            "tls": {"type": "array", "items": {"properties": {"name": {"type": "string"}}}},
        },
    }
    whole = {"properties": {"spec": spec, "status": {"type": "object"}}}
    definition = {
        "spec": {
            "group": "a.b",
            "names": {"kind": "C"},
            "versions": [{"name": "v1", "schema": {"openAPIV3Schema": whole}}],
        }
    }
    schema = manifests.trimmed(definition)
    assert schema["properties"]["apiVersion"] == {"const": "a.b/v1"}
    assert "status" not in schema["properties"]
    name = {"properties": {"name": {"type": "string"}}, "additionalProperties": False}
    assert schema["properties"]["spec"] == {
        "properties": {"podTemplate": True, "tls": {"type": "array", "items": name}},
        "additionalProperties": False,
    }


# ---- Agree with each other -------------------------------------------------------------------


@pytest.mark.parametrize("cluster", [CLUSTER, GPU], ids=["courier", "courier-gpu"])
def test_a_task_manager_has_one_slot_and_a_pool_of_its_own_that_listens_first(
    cluster: Manifest,
) -> None:
    assert cluster["spec"]["flinkConfiguration"]["taskmanager.numberOfTaskSlots"] == "1"
    pod = cluster["spec"]["taskManager"]["podTemplate"]["spec"]
    (pool,), (main,) = pod["initContainers"], pod["containers"]
    assert main["name"] == "flink-main-container"
    assert pool["restartPolicy"] == "Always"
    port = pool["startupProbe"]["tcpSocket"]["port"]
    assert f'environment_config = "localhost:{port}"' in SETTINGS
    assert pool["args"] == ["--worker_pool"]
    assert "command" not in pool
    assert 'ENTRYPOINT ["/opt/apache/beam/boot"]' in DOCKERFILE
    assert not list(every("job", cluster))  # a session cluster


def test_gpus_are_the_workers_and_not_the_task_managers() -> None:
    for cluster, gpus in ((CLUSTER, []), (GPU, ["1", "1"])):
        pod = cluster["spec"]["taskManager"]["podTemplate"]["spec"]
        assert list(every("nvidia.com/gpu", pod["initContainers"])) == gpus
        assert list(every("nvidia.com/gpu", pod["containers"])) == []


def test_images_are_ours_and_those_of_one_flink_and_of_our_beam() -> None:
    images = {image for manifest in ALL for image in every("image", manifest)}
    (beam,) = re.findall(r"^ARG BEAM_VERSION=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert images == {
        "registry.example/courier:latest",
        "flink:1.19.3-java11",
        f"apache/beam_flink1.19_job_server:{beam}",
    }
    assert {cluster["spec"]["flinkVersion"] for cluster in (CLUSTER, GPU)} == {"v1_19"}


def test_every_pod_that_mounts_the_shop_names_the_claim_and_may_write_there() -> None:
    (user,) = re.findall(r"--uid (\d+)", DOCKERFILE)
    pods = [pod for manifest in ALL for pod in every("spec", manifest) if "containers" in pod]
    assert len(pods) == 5
    for pod in pods:
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes["shop"]["persistentVolumeClaim"] == {"claimName": "courier-shop"}
        assert pod["securityContext"] == {"fsGroup": int(user)}
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
            assert mounts["shop"] == "/shop"
            assert set(mounts) <= set(volumes)
    assert named("PersistentVolumeClaim", "courier-shop")


def test_the_job_server_is_reached_as_the_settings_say_and_reaches_the_cluster() -> None:
    service = named("Service", "courier-job-server")["spec"]
    labels = JOB_SERVER["spec"]["template"]["metadata"]["labels"]
    assert service["selector"] == labels == JOB_SERVER["spec"]["selector"]["matchLabels"]
    container = only_container(JOB_SERVER["spec"])
    options = dict(arg.removeprefix("--").split("=") for arg in container["args"])
    ports = {port["name"]: str(port["containerPort"]) for port in container["ports"]}
    assert ports == {"jobs": options["job-port"], "artifacts": options["artifact-port"]}
    (port,) = service["ports"]
    assert port["targetPort"] == "jobs"
    assert f'job_endpoint = "courier-job-server:{port["port"]}"' in SETTINGS
    assert options["flink-master"] == f"{CLUSTER['metadata']['name']}-rest:8081"
    assert options["artifacts-dir"].startswith("/shop/")  # task managers read it
    assert options["job-host"] == f"$({container['env'][0]['name']})"


# ---- Settings --------------------------------------------------------------------------------


def settings_of(text: str, folder: Path) -> Settings:
    path = folder / "courier.toml"
    path.write_text(text)
    return load_settings(str(path))


@pytest.mark.parametrize("stage", [kind.name for kind in NIGHT])
def test_the_settings_send_every_stage_to_the_job_server(stage: str, tmp_path: Path) -> None:
    settings = settings_of(SETTINGS, tmp_path)
    options = pipeline_options(settings.beam, stage, [])
    runners.check_ready(options)
    assert options.view_as(StandardOptions).runner == "FlinkRunner"
    assert options.view_as(PortableOptions).environment_type == "EXTERNAL"
    assert options.view_as(FlinkRunnerOptions).flink_master == "courier-rest:8081"
    assert options.view_as(FlinkRunnerOptions).parallelism == 8


def test_the_settings_read_and_write_on_the_volume_alone(tmp_path: Path) -> None:
    settings = settings_of(SETTINGS, tmp_path)
    (pin,) = settings.pins
    paths = [settings.root, settings.catalogue.path, settings.impressions.path, pin.encoder]
    paths += [pin.codebook, *settings.catalogue.image_roots]
    assert all(path.startswith("/shop/") for path in paths)


def test_what_the_settings_have_as_comments_sends_embed_alone_to_the_gpus(tmp_path: Path) -> None:
    text = re.sub(r"^# (?=\[\w+(\.\w+)?\]$|\w+ = )", "", SETTINGS, flags=re.MULTILINE)
    settings = settings_of(text, tmp_path)
    assert settings.embed.device == "cuda"
    for stage in (kind.name for kind in NIGHT):
        flink = pipeline_options(settings.beam, stage, []).view_as(FlinkRunnerOptions)
        gpus = stage == "embed"
        assert (flink.flink_master, flink.parallelism) == (
            (f"{GPU['metadata']['name']}-rest:8081", 2) if gpus else ("courier-rest:8081", 8)
        )


# ---- Commands --------------------------------------------------------------------------------


def given_to_courier(container: dict[str, Any], folder: Path) -> list[str]:
    """Runs what a container runs, with a `courier` that prints what it is given."""
    stub = folder / "courier"
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    done = subprocess.run(
        [*container["command"], *container["args"]],
        env={"PATH": f"{folder}:{os.environ['PATH']}", "TZ": "Etc/UTC"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.splitlines()


def test_the_nightly_command_is_one_of_ours_for_yesterday(tmp_path: Path) -> None:
    before = dt.datetime.now(dt.UTC).date()
    given = given_to_courier(only_container(NIGHTLY), tmp_path)
    after = dt.datetime.now(dt.UTC).date()
    name, *options = given
    parse(name, *options)
    context = cli.commands[name].make_context(name, options)
    assert before <= context.params["ds"] + dt.timedelta(days=1) <= after


def test_the_command_for_some_days_is_one_of_ours(tmp_path: Path) -> None:
    name, *options = given_to_courier(only_container(DAYS), tmp_path)
    parse(name, *options)
    context = cli.commands[name].make_context(name, options)
    assert context.params["start_ds"] < context.params["end_ds"]


@pytest.mark.parametrize("job", [NIGHTLY, DAYS], ids=["nights", "days"])
def test_a_job_finds_its_settings_and_tries_again_what_may_end_otherwise(job: Manifest) -> None:
    container = only_container(job)
    variables = {found["name"]: found["value"] for found in container["env"]}
    options = {
        f"COURIER_REFRESH_{option.name.upper()}" for option in cli.commands["refresh"].params
    }
    config = variables["COURIER_REFRESH_CONFIG"]
    assert {name for name in variables if name != "TZ"} <= options
    (mount,) = (m for m in container["volumeMounts"] if m["name"] == "settings")
    assert config == f"{mount['mountPath']}/courier.toml"
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"]["containerName"] == container["name"]
    refusals = [OperatorError.exit_status, GateRefused.exit_status]
    assert sorted(rule["onExitCodes"]["values"]) == sorted(refusals)
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # what a failure policy asks for
    assert job["backoffLimit"] > 0


def test_a_night_is_tried_again_only_while_yesterday_is_the_same_day() -> None:
    minute, hour = named("CronJob", "courier-night")["spec"]["schedule"].split()[:2]
    begins = dt.timedelta(hours=int(hour), minutes=int(minute))
    ends = begins + dt.timedelta(seconds=NIGHTLY["activeDeadlineSeconds"])
    assert ends < dt.timedelta(days=1)


def test_the_nightly_zone_is_that_of_the_settings(tmp_path: Path) -> None:
    zone = named("CronJob", "courier-night")["spec"]["timeZone"]
    assert {"name": "TZ", "value": zone} in only_container(NIGHTLY)["env"]
    assert zone.removeprefix("Etc/") == settings_of(SETTINGS, tmp_path).day_timezone
