"""What the engines of `python -m launch` would execute: scripts, manifests, commands; sweeps and the status of runs."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from launch import kubernetes, slurm, status, sweep, tpu
from launch.__main__ import main
from lib.process import UserError, command
from lib.run import RunFolder, write_json, write_text

TRAIN = ["python", "-m", "ncsn", "train", "mnist_edm", "--out", "runs/a b"]


@pytest.fixture
def call(capsys):
    """Exit code, stdout and stderr of `python -m launch ...`."""

    def call(*words):
        capsys.readouterr()
        code = command(main, list(map(str, words)))
        return code, *capsys.readouterr()

    return call


def test_the_slurm_script(call):
    code, out, err = call("slurm", "--name", "edm", "--nodes", 4, "--gpus-per-node", 8, "--time", "2-00:00:00",
                          "--partition", "gpu", "--extra", "reservation=jax", "--setup", "module load cuda",
                          "--dry-run", "--", *TRAIN)  # fmt: skip
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "#!/bin/bash"
    for line in (
        "--job-name=edm",
        "--nodes=4",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--time=2-00:00:00",
        "--signal=TERM@120",
        "--partition=gpu",
        "--requeue",
        "--reservation=jax",
        "--open-mode=append",
    ):
        assert f"#SBATCH {line}" in lines
    assert "#SBATCH --account" not in out and "module load cuda" in lines
    assert "srun --kill-on-bad-exit=1 python -m ncsn train mnist_edm --out 'runs/a b' --resume" in lines
    assert 'if [ "$code" -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi' in lines
    assert lines[-1] == "sbatch --parsable runs/slurm/edm.sbatch"


@pytest.mark.parametrize(("status_of_srun", "requeued"), [(0, False), (2, False), (75, True), (137, False)])
def test_only_a_preempted_job_is_requeued(tmp_path, status_of_srun, requeued):
    """The script itself, with stand-ins for srun and scontrol."""
    for name, body in {"srun": f"exit {status_of_srun}", "scontrol": f"echo $@ >> {tmp_path}/told"}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    text = slurm.script(slurm.Slurm(), ["true"])
    variables = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "41"}
    done = subprocess.run(["bash", "-c", text], env=variables, check=False)
    assert done.returncode == status_of_srun
    told = tmp_path / "told"
    assert told.exists() == requeued and (not requeued or told.read_text() == "requeue 41\n")


def test_a_submitted_job(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "sbatch").write_text("#!/bin/bash\necho '17;cluster'\n")
    (tmp_path / "sbatch").chmod(0o755)
    code, out, err = call("slurm", "--", *TRAIN)
    assert code == 0 and "job 17; output: runs/slurm/gradient-fields-17*.out" in out, err
    assert Path("runs/slurm/gradient-fields.sbatch").read_text().startswith("#!/bin/bash")


def test_the_manifest_of_gpus():
    options = kubernetes.Kubernetes("registry/fields:1", name="edm", hosts=4, gpus=8, volume="runs", memory="64Gi")
    made = kubernetes.manifest(options, ["python", "-m", "x"])
    assert (made["apiVersion"], made["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (workers,) = made["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["completionMode"]) == (4, 4, "Indexed")
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2] and job["backoffLimit"] == 0
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["python", "-m", "x"]
    assert container["resources"] == {
        "requests": {"memory": "64Gi", "nvidia.com/gpu": "8"}, "limits": {"nvidia.com/gpu": "8"}
    }  # fmt: skip
    environment = {e["name"]: e.get("value") for e in container["env"]}
    # The name of the first pod of the first job, in the subdomain of the JobSet.
    assert environment["GRADIENT_FIELDS_COORDINATOR"] == f"edm-{workers['name']}-0-0.edm:8476"
    assert made["spec"]["network"]["subdomain"] == "edm" and environment["GRADIENT_FIELDS_PROCESSES"] == "4"
    assert pod["restartPolicy"] == "Never" and pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "runs"
    json.dumps(made)


def test_the_manifest_of_tpus_and_of_one_pod():
    options = kubernetes.Kubernetes("i", hosts=4, tpu="tpu-v5-lite-podslice", topology="4x4")
    pod = kubernetes.manifest(options, ["x"])["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4"
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": "4"}
    alone = kubernetes.manifest(kubernetes.Kubernetes("i"), ["x"])["spec"]["replicatedJobs"][0]
    assert alone["template"]["spec"]["template"]["spec"]["containers"][0]["env"] == []


def _strict(schema):
    """Unknown fields are refused, as a server with strict validation does."""
    if isinstance(schema, dict):
        if schema.get("x-kubernetes-int-or-string"):
            schema.pop("type", None)
        if schema.get("type") == "object" and "properties" in schema:
            schema.setdefault("additionalProperties", False)
    for part in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        _strict(part)
    return schema


@pytest.mark.skipif("JOBSET_CRD" not in os.environ, reason="JOBSET_CRD names no file: the CRD of JobSet's release")
@pytest.mark.parametrize(
    "options",
    [
        kubernetes.Kubernetes("i", hosts=4, gpus=8, volume="runs", cpu="8", memory="64Gi"),
        kubernetes.Kubernetes("i", hosts=4, tpu="tpu-v5-lite-podslice", topology="4x4"),
        kubernetes.Kubernetes("i"),
    ],
)
def test_manifests_are_valid_by_the_published_schema(options):
    """config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml of github.com/kubernetes-sigs/jobset."""
    yaml, jsonschema = pytest.importorskip("yaml"), pytest.importorskip("jsonschema")
    versions = yaml.safe_load(Path(os.environ["JOBSET_CRD"]).read_text())["spec"]["versions"]
    (schema,) = (v["schema"]["openAPIV3Schema"] for v in versions if v["name"] == "v1alpha2")
    schema["properties"]["metadata"] = {"type": "object"}
    jsonschema.Draft202012Validator(_strict(schema)).validate(kubernetes.manifest(options, ["x"]))


def test_kubernetes_dry_run(call):
    code, out, err = call("kubernetes", "--image", "i", "--dry-run", "--", *TRAIN)
    assert code == 0, err
    text, _, last = out.rstrip().rpartition("\n")
    assert last == "kubectl apply --filename -"
    container = json.loads(text)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
    assert container["command"] == [*TRAIN, "--resume"]


def test_tpu_commands(call):
    where = ("--name", "pod", "--zone", "us-central2-b", "--dry-run")
    code, out, err = call("tpu", "create", *where, "--type", "v4-32", "--version", "tpu-ubuntu2204-base", "--spot")
    assert code == 0, err
    assert out == (
        "gcloud compute tpus tpu-vm create pod --accelerator-type v4-32 --version tpu-ubuntu2204-base --zone "
        "us-central2-b --spot\n"
    )
    _, out, _ = call("tpu", "create", *where, "--queued", "--project", "p")
    assert out.startswith("gcloud compute tpus queued-resources create pod --node-id pod") and "--project p" in out
    _, out, _ = call("tpu", "run", *where, "--", *TRAIN)
    lines = [shlex.split(line) for line in out.splitlines()]
    assert lines[0][:2] == ["git", "archive"] and lines[1][4] == "scp" and "--worker=all" in lines[1]
    assert lines[3][-1].endswith(f"GRADIENT_FIELDS_CLUSTER=tpu {shlex.join([*TRAIN, '--resume'])}")
    _, out, _ = call("tpu", "collect", *where, "--folder", "runs/edm")
    assert "scp --recurse pod:gradient-fields/runs/edm runs --zone" in out and "--worker=0" in out
    _, out, _ = call("tpu", "delete", *where)
    assert out == "gcloud compute tpus tpu-vm delete pod --zone us-central2-b --quiet\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["slurm"], "no command given"),
        (["slurm", "--", "python", "-m", "ncsn", "train", "mnist_edm"], "needs --out RUN"),
        (["slurm", "--name", "My Job", "--", "true"], "'My Job' is no name"),
        (["slurm", "--time", "1h", "--", "true"], "time is '1h'"),
        (["slurm", "--gpus-per-node", "8", "--tasks-per-node", "4", "--", "true"], "must be 1 or gpus-per-node"),
        (["kubernetes", "--", "true"], "which image?"),
        (["kubernetes", "--image", "i", "--tpu", "v5", "--", "true"], "--tpu needs --topology"),
        (["tpu"], "create|run|collect|delete"),
        (["tpu", "create"], "--name and --zone are needed"),
        (["tpu", "collect", "--name", "a", "--zone", "z", "--folder", "/x"], "relative to the project"),
        (["sweep", "--grid", "seed=0", "--", "true"], "over trainings without --out"),
        (["sweep", "--", *TRAIN[:-2]], "either --grid or --list"),
        (["sweep", "--grid", "seed", "--", *TRAIN[:-2]], "'seed' is not FIELD=A,B"),
        (["sweep", "--grid", "a.seed=0", "b.seed=0", "--grid", "a.seed=0,0", "--", *TRAIN[:-2]], "the same name"),
        (["sweep", "--list", "absent.txt", "--", *TRAIN[:-2]], "absent.txt: No such file"),
        (["sweep", "--summary", "--out", "nothing"], "nothing holds no run folder"),
        (["status"], "usage: python -m launch status"),
        (["status", "nothing"], "nothing holds no run folder"),
    ],
)
def test_mistakes(call, words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = call(*words)
    assert code == 2 and len(err.splitlines()) == 1 and message in err, err


def test_missing_engines_are_told(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = call("slurm", "--", "true")
    assert code == 2 and "sbatch is not installed here: --dry-run prints" in err


# ---- Sweeps. The training is a stand-in that leaves what a training leaves, so that they take no minutes.

STAND_IN = """
import json, sys
from pathlib import Path
words = sys.argv[1:]
out = Path(words[words.index("--out") + 1])
lr = words[words.index("--optim.lr") + 1]
(out / "checkpoints").mkdir(parents=True, exist_ok=True)
with open("order.txt", "a") as file: file.write(out.name + "\\n")
(out / "config.json").write_text(json.dumps({"package": "hnn", "config": {"lr": lr}}))
(out / "environment.json").write_text("[{}]")
if lr == "bad" and not Path("mended").exists(): sys.exit(3)
if lr == "wrong": sys.exit(2)
(out / "evaluation.json").write_text(json.dumps({"hnn.energy": 2 * float(0 if lr == "bad" else lr), "hnn.note": "x"}))
(out / "report.html").write_text("done")
"""


@pytest.fixture
def training(tmp_path, monkeypatch):
    """`python -m hnn train` in an empty folder, by a stand-in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hnn").mkdir()
    write_text(tmp_path / "hnn" / "__init__.py", "")
    write_text(tmp_path / "hnn" / "__main__.py", STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return ["python", "-m", "hnn", "train", "spring"]


def test_a_sweep_runs_every_combination_once(call, training):
    code, out, err = call("sweep", "--grid", "optim.lr=1,2", "seed=0,1,2", "--out", "S", "--", *training)
    assert code == 0, err
    names = [f"lr={lr}_seed={seed}" for lr in (1, 2) for seed in (0, 1, 2)]
    assert Path("order.txt").read_text().split() == names
    assert json.loads(Path("S/summary.json").read_text())["lr=2_seed=1"] == {"hnn.energy": 4.0}
    assert "| lr=1_seed=2 | finished | 2 |" in Path("S/summary.md").read_text() and "hnn.energy" in out
    code, _, err = call("sweep", "--grid", "optim.lr=1,2", "seed=0,1,2", "--out", "S", "--", *training)
    assert code == 0 and len(Path("order.txt").read_text().split()) == 6, err  # nothing is done twice


def test_a_sweep_goes_on_after_a_failure(call, training):
    line = ("sweep", "--grid", "optim.lr=1,bad,2", "--jobs", 2, "--out", "S", "--", *training)
    code, _, err = call(*line)
    assert code == 2 and "1 of 3 runs failed: lr=bad (exit code 3); the same command goes on" in err
    Path("mended").touch()
    code, _, err = call(*line)
    assert code == 0 and sorted(Path("order.txt").read_text().split()) == ["lr=1", "lr=2", "lr=bad", "lr=bad"], err
    Path("list.txt").write_text("# mine\n--optim.lr wrong\n\n--optim.lr 3 --seed 1\n")
    code, _, err = call("sweep", "--list", "list.txt", "--out", "T", "--", *training)
    assert code == 2 and "optim.lr_wrong" in err and "was refused (exit code 2)" in err


def test_a_sweep_as_an_array(call, training, tmp_path):
    code, out, err = call("sweep", "--grid", "optim.lr=1,2", "--engine", "slurm", "--out", "S", "--dry-run",
                          "--batch.partition", "cpu", "--", *training)  # fmt: skip
    assert code == 0, err
    assert "#SBATCH --array=0-1" in out and "#SBATCH --partition=cpu" in out and not Path("S").exists()
    assert f"python -m hnn train spring --optim.lr 1 --out S/lr=1 --resume\n{training[0]} -m hnn" in out
    # What a task of the array executes, with a stand-in for srun that runs its arguments.
    Path("S").mkdir()
    Path("S/commands.txt").write_text("echo first\necho 'the second'\n")
    text = slurm.script(slurm.Slurm(), [str(tmp_path / "S/commands.txt")], array=2)
    (tmp_path / "srun").write_text('#!/bin/bash\nshift\nexec "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    variables = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "1"}
    done = subprocess.run(["bash", "-c", text], env=variables, capture_output=True, text=True, check=True)
    assert done.stdout == "the second\n"


def test_names_of_runs():
    made = sweep.plan(sweep.Sweep(("data.source=a/b,c", "optim.weight_decay=0.1")))
    assert made[0] == ("source=a-b_weight_decay=0.1", ["--data.source", "a/b", "--optim.weight-decay", "0.1"])


# ---- Status


def test_the_status_of_runs(tmp_path, call):
    with RunFolder.start(tmp_path / "runs" / "a", "hnn", {}, resume=False) as folder:
        log = folder.logger("spring", 0)
        log(10, {"loss": 2.5})
        log(20, {"loss": 1.5})
        assert status.row(folder.path)[1:5] == ["hnn", "running", "20", "1.5"]
    assert status.row(folder.path)[2] == "stopped"
    write_json(folder.path / "evaluation.json", {})
    write_text(folder.path / "report.html", "x")
    code, out, err = call("status", tmp_path)
    assert code == 0 and "finished" in out and str(folder.path) in out, err
    with pytest.raises(UserError, match="holds no run folder"):
        status.found(tmp_path / "runs" / "b")


def test_help(call):
    code, out, _ = call("--help")
    assert code == 0 and len(out.splitlines()) <= 24
    for name in ("local", "slurm", "kubernetes", "tpu", "sweep", "status", "plan", "reproduce", "demo"):
        assert f"  {name}" in out
    assert tpu.USAGE.startswith("python -m launch tpu") and sys.executable
