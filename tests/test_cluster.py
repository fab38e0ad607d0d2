"""lib/cluster.py: who the other processes are, meeting them in time, and leaving when one is gone."""

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lib import cluster
from lib.cluster import Peers, first_host, meet, peers
from lib.process import UserError

ROOT = Path(__file__).resolve().parents[1]
SLURM = {
    "SLURM_JOB_ID": "4097", "SLURM_STEP_NODELIST": "gpu[007-010,12]", "SLURM_NTASKS": "8", "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1", "SLURM_STEP_NUM_NODES": "4",
}  # fmt: skip
MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2",
       "OMPI_COMM_WORLD_LOCAL_RANK": "2"}  # fmt: skip
OURS = {"GRADIENT_FIELDS_COORDINATOR": "a:1", "GRADIENT_FIELDS_PROCESSES": "3", "GRADIENT_FIELDS_PROCESS": "2"}


def test_who_the_others_are():
    assert peers({}) is None
    assert peers(OURS) == Peers("a:1", 3, 2, None)
    assert peers(OURS | SLURM | {"GRADIENT_FIELDS_LOCAL": "1"}) == Peers(
        "a:1", 3, 2, 1
    )  # what is said explicitly counts
    assert peers(SLURM) == Peers("gpu007:61441", 8, 5, 1)
    assert peers(SLURM | {"SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}) == Peers("gpu007:61441", 4, 5, None)
    assert peers(SLURM | {"SLURM_NTASKS": "1"}) is None
    batch = {name: value for name, value in SLURM.items() if "STEP" not in name}
    assert peers(batch) is None  # the script of a job is no task of it
    found = peers(MPI)
    assert found is not None and found[1:] == (4, 2, 2) and found.coordinator.startswith("127.0.0.1:6")


def test_tpu_pods_are_known_by_their_workers():
    assert not cluster.on_tpu_pod({}) and not cluster.on_tpu_pod({"TPU_WORKER_HOSTNAMES": "localhost"})
    assert cluster.on_tpu_pod({"TPU_WORKER_HOSTNAMES": "a,b"}) and cluster.on_tpu_pod(
        {"GRADIENT_FIELDS_CLUSTER": "tpu"}
    )


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node001", "node001"),
        ("node001,other", "node001"),
        ("n[001-015],x", "n001"),
        ("n[3,5-6]", "n3"),
        ("n[07]", "n07"),
    ],
)
def test_the_first_host(nodes, host):
    assert first_host(nodes) == host


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (OURS | {"GRADIENT_FIELDS_PROCESS": "3"}, "GRADIENT_FIELDS_PROCESS is 3 of 3"),
        (OURS | {"GRADIENT_FIELDS_PROCESSES": "many"}, "GRADIENT_FIELDS_PROCESSES must be a number, not 'many'"),
        (SLURM | {"SLURM_PROCID": ""}, "SLURM_PROCID must be a number"),
        (MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, "Open MPI on several machines: set GRADIENT_FIELDS_COORDINATOR"),
    ],
)
def test_variables_that_cannot_be(environment, message):
    with pytest.raises(UserError, match=message):
        peers(environment)


@pytest.mark.parametrize("text", ["soon", "0", "-1", "inf"])
def test_times_that_cannot_be(monkeypatch, text):
    monkeypatch.setenv(cluster.WAIT_VARIABLE, text)
    with pytest.raises(UserError, match="must be a positive number of seconds"):
        cluster.wait_s()


# ---- Meeting


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def meeting(numbers, count, timeout_s):
    """{number: None or the error} of processes that meet, each in a thread."""
    port, found = free_port(), {}

    def one(number):
        try:
            found[number] = meet(Peers(f"127.0.0.1:{port}", count, number), timeout_s)
        except UserError as error:
            found[number] = str(error)

    threads = [threading.Thread(target=one, args=(number,)) for number in numbers]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join(timeout_s + 10)
    return found


@pytest.mark.parametrize("numbers", [[0, 1, 2], [2, 1, 0], [1, 0, 2], [0]])
def test_all_that_come_meet(numbers):
    assert meeting(numbers, len(numbers), 10) == dict.fromkeys(numbers)


def test_those_that_do_not_come_are_named_to_all():
    found = meeting([0, 2], 5, 0.7)
    assert found[0] == found[2] and "processes 1, 3, 4 of 5 did not come within 0.7 s" in found[0]
    assert "process 0 of 2 did not come" in meeting([1], 2, 0.3)[1]


def test_strangers_on_the_port_do_not_count():
    port, found = free_port(), []
    wait = threading.Thread(target=lambda: found.append(meet(Peers(f"127.0.0.1:{port}", 2, 0), 10)))
    wait.start()
    time.sleep(0.2)
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\n")
    assert meet(Peers(f"127.0.0.1:{port}", 2, 1), 10) is None
    wait.join(10)
    assert found == [None]


def test_a_port_that_is_taken_and_an_address_that_is_none():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"process 0 cannot listen on port {port}"):
            meet(Peers(f"127.0.0.1:{port}", 2, 0), 1)
    with pytest.raises(UserError, match="'here' is no HOST:PORT"):
        meet(Peers("here", 2, 0), 1)


# ---- Leaving


def run(source):
    command = [sys.executable, "-c", "import time\nfrom lib import cluster\n" + source]
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, check=False)


def test_a_step_that_takes_too_long_ends_the_process():
    done = run("with cluster.Watchdog(0.3) as w:\n    for _ in range(5): time.sleep(0.1); w.beat()\n    time.sleep(30)")
    assert done.returncode == 75
    assert done.stderr == (
        "stopped: no step was finished in 0.3 s: another process hangs or is gone; --resume goes on from the newest "
        "checkpoint\n"
    )


def test_a_watchdog_that_is_left_watches_no_more():
    done = run("with cluster.Watchdog(0.2): pass\ntime.sleep(0.6)\nprint('here')")
    assert (done.returncode, done.stdout) == (0, "here\n")


@pytest.mark.parametrize(
    ("message", "code"), [("UNKNOWN: Gloo all-reduce failed: Connection closed", 75), ("other", 1)]
)
def test_a_lost_peer_is_one_line_and_other_errors_are_themselves(message, code):
    done = run(f"with cluster.losing_a_peer_ends(): raise ValueError({message!r})")
    assert done.returncode == code
    if code == 75:
        assert done.stderr.startswith("stopped: another process is gone;") and done.stderr.count("\n") == 1
    else:
        assert "Traceback" in done.stderr


TRAINING = """
import sys, os, time
from pathlib import Path
import numpy as np, optax, jax, jax.numpy as jnp
from lib import shard
from lib.checkpoint import Checkpoints
from lib.data import Resident
from lib.process import command
from lib.train import fit, init_state, make_step

def main(args):
    out, steps = Path(args[0]), int(args[1])
    shard.start(cpu_devices=1)
    x = np.random.default_rng(0).standard_normal((96, 5)).astype(np.float32)
    loss = lambda p, b, k: (jnp.mean((jnp.tanh(b["x"] @ p["w"]).sum(1) - b["y"]) ** 2), {})
    tx = optax.adam(1e-2)
    with Checkpoints(out / "checkpoints") as checkpoints:
        fresh = shard.place(init_state({"w": jnp.eye(5, 8)}, tx, jax.random.key(1)), shard.make_mesh())
        state = checkpoints.restore(fresh)
        state = fit(
            fresh if state is None else state, make_step(loss, tx), Resident({"x": x, "y": np.sin(x.sum(1))}, 32),
            steps=steps, mesh=shard.make_mesh(), steps_per_call=5, checkpoints=checkpoints, checkpoint_every=20,
            log=lambda step, metrics: (os.write(1, f"step {step} {os.getpid()}\\n".encode()), time.sleep(0.02)),
        )
    np.save(out / f"{jax.process_index()}.npy", shard.fetch(state.params)["w"])

sys.exit(command(main))
"""


TWO_FOLDERS = """
import sys
from pathlib import Path
import jax.numpy as jnp
from lib import shard
from lib.checkpoint import Checkpoints
from lib.process import command

def main(args):
    out, count = Path(args[0]), int(args[1])
    shard.start(cpu_devices=1)
    with Checkpoints(out / "last") as last, Checkpoints(out / "best", keep=1) as best:
        for step in range(count):
            state = shard.place({"w": jnp.full(4, step)}, shard.make_mesh())
            last.save(step, state)
            best.save(step, state)
    print(f"{last.steps()} {best.steps()}\\n", end="", flush=True)  # one write

sys.exit(command(main))
"""


def start(tmp_path, out, steps, processes=2, script=TRAINING):
    out.mkdir(exist_ok=True)
    (tmp_path / "train.py").write_text(script)
    variables = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path), cluster.WAIT_VARIABLE: "20"}
    words = [sys.executable, str(tmp_path / "train.py"), str(out), str(steps)]
    return subprocess.Popen(
        [sys.executable, "-m", "launch", "local", "--processes", str(processes), "--grace-s", "5", "--", *words],
        cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_one_of_two_is_killed_at_random_and_resumed_to_the_bit(tmp_path, victim):
    assert finished(start(tmp_path, tmp_path / "whole", 200))[0] == 0
    wanted = [(tmp_path / "whole" / f"{i}.npy").read_bytes() for i in range(2)]
    rng = random.Random(victim)
    for attempt in range(5):
        out = tmp_path / f"run{attempt}"
        run = start(tmp_path, out, 200)
        kill_at(run, victim, rng.randrange(5, 190))
        began = time.monotonic()
        code, err = finished(run)
        assert code == 128 + signal.SIGKILL and time.monotonic() - began < 20
        assert f"launch: process {victim} of 2 was ended by SIGKILL; the others are asked to end\n" in err, err
        assert finished(start(tmp_path, out, 200))[0] == 0
        assert [(out / f"{i}.npy").read_bytes() for i in range(2)] == wanted


def kill_at(run, victim, step):
    """Kills one of the processes as soon as it has told that step."""
    for line in run.stdout:
        words = line.removeprefix("[1] ").split()
        if line.startswith("[1]") == (victim == 1) and words[0] == "step" and int(words[1]) >= step:
            os.kill(int(words[2]), signal.SIGKILL)
            return


def finished(run):
    """(exit code, stderr)"""
    with run:
        _, err = run.communicate(timeout=120)
        return run.returncode, err


@pytest.mark.slow
def test_two_folders_are_saved_at_once(tmp_path):
    """As a GAN saves its last and its best generator; without waiting, some saves meet at one barrier."""
    run = start(tmp_path, tmp_path / "run", 20, script=TWO_FOLDERS)
    out, err = run.communicate(timeout=120)
    assert run.returncode == 0 and "[18, 19] [19]" in out.splitlines(), err
