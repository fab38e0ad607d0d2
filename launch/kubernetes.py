"""`python -m launch kubernetes [options] -- COMMAND`: a JobSet of indexed pods, for node pools of GPUs or of TPUs.

JobSet gives the pods names that they find each other by, and starts all of them again where one ends: a pod that was
preempted exits with 75, and the run goes on with `--resume`, for which its folder has to lie on a volume that outlives
pods. A user's mistake (exit code 2) ends the JobSet at once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch import jobs
from lib.config import parse
from lib.process import EXIT_USER_ERROR, UserError
from lib.run import write_text

USAGE = "python -m launch kubernetes --image IMAGE [--hosts N] [--gpus G | --tpu TYPE --topology T] -- COMMAND..."
PORT = 8476
_JOB = "workers"


@dataclass(frozen=True)
class Kubernetes:
    """Writes the manifest of a JobSet for a command and applies it."""

    image: str = ""
    """container image (launch/Dockerfile builds one)"""
    name: str = "gradient-fields"
    """of the JobSet"""
    namespace: str = "default"
    hosts: int = 1
    """pods, one process each"""
    gpus: int = 0
    """of each pod"""
    tpu: str | None = None
    """type of a GKE node pool, e.g. tpu-v5-lite-podslice"""
    topology: str | None = None
    """of the TPU slice, e.g. 4x4"""
    chips: int = 4
    """TPU chips of each pod"""
    cpu: str | None = None
    """requested cores, e.g. 8"""
    memory: str | None = None
    """requested memory, e.g. 32Gi"""
    volume: str | None = None
    """persistent volume claim (ReadWriteMany) that is mounted at /data: run folders and data sets belong there"""
    max_restarts: int = 100
    """of all pods together, for preemptions and failures"""
    grace_s: int = 120
    """seconds that pods have to save"""
    out: Path | None = None
    """write the manifest here as well"""
    dry_run: bool = False
    """print the manifest and the command, and do nothing"""

    def __post_init__(self) -> None:
        jobs.check_name(self.name)
        if min(self.hosts, self.chips, self.grace_s) < 1 or min(self.gpus, self.max_restarts) < 0:
            raise UserError("hosts, chips and grace-s must be at least 1, gpus and max-restarts not negative")
        if self.tpu and (self.gpus or not self.topology):
            raise UserError("--tpu needs --topology, and no --gpus")


def main(args: Sequence[str]) -> None:
    words, command = jobs.split(args, USAGE)
    options = parse(Kubernetes(), words, "python -m launch kubernetes")
    if not options.image:
        raise UserError("which image? --image REGISTRY/NAME:TAG; launch/Dockerfile builds one")
    text = json.dumps(manifest(options, jobs.resumable(command)), indent=2)
    if options.out is not None and not options.dry_run:
        write_text(options.out, text + "\n")
    if options.dry_run:
        print(text)
    told = jobs.execute(["kubectl", "apply", "--filename", "-"], dry_run=options.dry_run, given=text)
    print(told, end="")


def manifest(options: Kubernetes, command: Sequence[str]) -> dict[str, Any]:
    """The JobSet (jobset.x-k8s.io/v1alpha2), as JSON, which is YAML too."""
    index = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
    environment: list[dict[str, Any]] = [
        {"name": "GRADIENT_FIELDS_COORDINATOR", "value": f"{options.name}-{_JOB}-0-0.{options.name}:{PORT}"},
        {"name": "GRADIENT_FIELDS_PROCESSES", "value": str(options.hosts)},
        {"name": "GRADIENT_FIELDS_PROCESS", "valueFrom": index},
    ]
    if options.hosts == 1:
        environment = []
    container: dict[str, Any] = {
        "name": "main",
        "image": options.image,
        "command": list(command),
        "env": environment,
        "ports": [{"containerPort": PORT}],
        "resources": _resources(options),
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": options.grace_s,
        "containers": [container],
    }
    if options.volume:
        container["volumeMounts"] = [{"name": "data", "mountPath": "/data"}]
        pod["volumes"] = [{"name": "data", "persistentVolumeClaim": {"claimName": options.volume}}]
    if options.tpu:
        pod["nodeSelector"] = {
            "cloud.google.com/gke-tpu-accelerator": options.tpu,
            "cloud.google.com/gke-tpu-topology": options.topology,
        }
    mistake = {"containerName": "main", "operator": "In", "values": [EXIT_USER_ERROR]}
    job = {
        "parallelism": options.hosts,
        "completions": options.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": mistake}]},
        "template": {"spec": pod},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": options.name, "namespace": options.namespace},
        "spec": {
            "network": {"enableDNSHostnames": True, "subdomain": options.name},
            "failurePolicy": {
                "maxRestarts": options.max_restarts,
                "rules": [{"name": "mistake", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [{"name": _JOB, "replicas": 1, "template": {"spec": job}}],
        },
    }


def _resources(options: Kubernetes) -> dict[str, Any]:
    asked = {"cpu": options.cpu, "memory": options.memory}
    if options.gpus:
        asked["nvidia.com/gpu"] = str(options.gpus)
    if options.tpu:
        asked["google.com/tpu"] = str(options.chips)
    found = {name: value for name, value in asked.items() if value is not None}
    # Accelerators cannot be requested without a limit.
    return {"requests": found, "limits": {k: v for k, v in found.items() if "/" in k}} if found else {}
