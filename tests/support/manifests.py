"""Says what Kubernetes, or the operator of Flink, would refuse in a manifest or drop unread.

Kubernetes' own kinds are those of the package kubernetes-validate. `flinkdeployment.json` has what
the operator's FlinkDeployment takes, of the release that it names, with its licence and notice:

    mvn dependency:copy -DoutputDirectory=. \\
        -Dartifact=org.apache.flink:flink-kubernetes-operator-api:1.10.0
    python -m tests.support.manifests flink-kubernetes-operator-api-1.10.0.jar

writes it anew. Of the schema in the jar it keeps `spec`, the rest being for the operator to fill.
Pod templates are Kubernetes' own pods, and stand there as true; descriptions are left out.
"""

import json
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

SCHEMA = Path(__file__).with_name("flinkdeployment.json")
# The oldest that has sidecars unasked, and the newest that the package knows.
VERSIONS = ("1.29", "1.37")
_IN_THE_JAR = "META-INF/fabric8/flinkdeployments.flink.apache.org-v1.yml"
Manifest = dict[str, Any]


def read(path: Path) -> list[Manifest]:
    return list(yaml.safe_load_all(path.read_text()))


def faults(manifest: Manifest) -> list[str]:
    """Returns what is wrong with a manifest: fields that nothing reads, values of other types."""
    if manifest["apiVersion"].startswith("flink.apache.org/"):
        return [*_faults_of_flink(manifest), *_faults_of_kubernetes(pods(manifest))]
    return _faults_of_kubernetes([manifest])


def _faults_of_kubernetes(manifests: list[Manifest]) -> list[str]:
    found = []
    for manifest in manifests:
        for version in VERSIONS:
            try:
                kubernetes_validate.validate(manifest, version, strict=True)
            except kubernetes_validate.ValidationError as error:
                found.append(f"{version}: {error.json_path}: {error.message}")
    return found


def pods(manifest: Manifest) -> list[Manifest]:
    """Returns the templates of pods in a FlinkDeployment."""
    spec = manifest["spec"]
    owners = (spec, spec.get("jobManager", {}), spec.get("taskManager", {}))
    return [owner["podTemplate"] for owner in owners if "podTemplate" in owner]


def _faults_of_flink(manifest: Manifest) -> Iterator[str]:
    schema = json.loads(SCHEMA.read_text())["schema"]
    for error in jsonschema.Draft202012Validator(schema).iter_errors(manifest):
        yield f"{error.json_path}: {error.message}"


# ---- The operator's schema ---------------------------------------------------------------------


def trimmed(definition: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the JSON schema of a FlinkDeployment, of the definition that the operator installs.

    Objects take no fields but those that they list: Kubernetes would drop others.
    """
    names = definition["spec"]["names"]
    (version,) = definition["spec"]["versions"]
    whole = version["schema"]["openAPIV3Schema"]
    api_version = f"{definition['spec']['group']}/{version['name']}"
    return {
        "type": "object",
        "properties": {
            "apiVersion": {"const": api_version},
            "kind": {"const": names["kind"]},
            "metadata": {"type": "object"},
            "spec": _closed(whole["properties"]["spec"]),
        },
        "required": ["apiVersion", "kind", "metadata", "spec"],
        "additionalProperties": False,
    }


def _closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: value for name, value in schema.items() if name != "description"}
    if "properties" in found:
        found["properties"] = {
            name: True if name == "podTemplate" else _closed(value)
            for name, value in found["properties"].items()
        }
        found["additionalProperties"] = False
    for inner in ("items", "additionalProperties"):
        if isinstance(found.get(inner), dict):
            found[inner] = _closed(found[inner])
    return found


def main(jar: str) -> None:
    with zipfile.ZipFile(jar) as archive:
        definition = yaml.safe_load(archive.read(_IN_THE_JAR))
        notice = archive.read("META-INF/NOTICE").decode().split()
    found = {
        "from": f"{Path(jar).stem}, trimmed by {Path(__file__).name}",
        "licence": "Apache License, Version 2.0",
        "notice": " ".join(notice),
        "schema": trimmed(definition),
    }
    SCHEMA.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
