"""Two hosts of our own, network namespaces with an ssh server each, train as one does."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from declip_train.checkpoint import file_digest
from declip_train.monitor import read_log
from declip_train.settings import TrainSettings
from declip_train.supervision import ENDED_EARLY

if TYPE_CHECKING:
    from tests.train.rendezvous_workers import train_here
    from tests.train.several_processes import run_processes
    from tests.train.training_data import write_training_data
else:
    sys.path.insert(0, str(Path(__file__).parent))
    from rendezvous_workers import train_here
    from several_processes import run_processes
    from training_data import write_training_data

SSHD = shutil.which("sshd", path="/usr/sbin:/usr/bin:/sbin")
SETTINGS: dict[str, Any] = {
    "model": "test",
    "augmentation": "demo",
    "global_batch_size": 8,
    "max_steps": 4,
    "warmup_steps": 1,
    "num_ranks": 2,
    "log_every_steps": 1,
    "checkpoint_every_steps": 2,
    "projector_dim": 32,
    "predictor_hidden_dim": 16,
}
SSHD_CONFIG = """
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
StrictModes no
UsePAM no
PidFile none
PermitRootLogin yes
PasswordAuthentication no
"""


def cannot_have_hosts() -> str:
    """Why there can be no two hosts here; empty where there can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs root on Linux for network namespaces"
    if SSHD is None or shutil.which("ssh") is None or shutil.which("ip") is None:
        return "needs ssh, sshd and ip (apt install openssh-client openssh-server iproute2)"
    name = f"declip-try-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False)
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return "" if made.returncode == 0 else "the kernel allows no network namespace here"


def command(line):
    subprocess.run(line.split(), check=True, capture_output=True)


@pytest.fixture
def hosts(tmp_path, monkeypatch):
    """Two namespaces with a cable between them; names and addresses."""
    reason = cannot_have_hosts()
    if reason:
        pytest.skip(reason)
    folder = tmp_path / "ssh"
    folder.mkdir()
    Path("/run/sshd").mkdir(exist_ok=True)
    for key in ("host", "user"):
        words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)]
        subprocess.run(words, check=True)
    (folder / "config").write_text(SSHD_CONFIG.format(folder=folder))
    names = [f"declip-{os.getpid()}-{which}" for which in "ab"]
    addresses = ["10.254.77.1", "10.254.77.2"]
    servers = []
    try:
        for name in names:
            command(f"ip netns add {name}")
        command(f"ip link add veth-d netns {names[0]} type veth peer name veth-d netns {names[1]}")
        for name, address in zip(names, addresses, strict=True):
            command(f"ip -n {name} addr add {address}/24 dev veth-d")
            command(f"ip -n {name} link set veth-d up")
            command(f"ip -n {name} link set lo up")
            serve = ["ip", "netns", "exec", name, str(SSHD), "-D", "-f", str(folder / "config")]
            servers.append(subprocess.Popen([*serve, "-E", str(folder / f"{name}.log")]))
        options = "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
        monkeypatch.setenv("OPENDECLIP_SSH", f"ssh -F /dev/null -i {folder}/user {options}")
        wait_for_server(names[0], addresses[1], folder)
        yield names, addresses
    finally:
        for server in servers:
            server.terminate()
            server.wait()
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def wait_for_server(name, address, folder):
    ssh = os.environ["OPENDECLIP_SSH"].split()
    words = ["ip", "netns", "exec", name, *ssh, "-o", "BatchMode=yes", address, "true"]
    deadline = time.monotonic() + 20
    while (done := subprocess.run(words, check=False, capture_output=True)).returncode:
        assert time.monotonic() < deadline, done.stderr.decode()
        time.sleep(0.1)


def configuration(root, **more):
    write_training_data(root)
    (root / "train").mkdir()
    config = root / "train" / "config.json"
    settings = TrainSettings(**SETTINGS, root="..", **more)
    config.write_bytes(settings.to_json())
    return config


def environment():
    sources = sorted((Path(__file__).parents[2] / "packages").glob("*/src"))
    path = os.pathsep.join(str(source) for source in sources)
    return {**os.environ, "PYTHONPATH": path, "DS_ACCELERATOR": "cpu"}


def train_on_one_host(config):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run_processes(train_here, 2, str(port), str(config))


def losses(root):
    return [record["total"] for record in read_log(root / "train")]


@pytest.mark.distributed
@pytest.mark.slow
def test_two_hosts_train_as_one_with_as_many_processes(tmp_path, hosts):
    names, addresses = hosts
    hostfile = tmp_path / "hosts"
    hostfile.write_text("".join(f"{address} slots=1\n" for address in addresses))
    one, two = tmp_path / "one", tmp_path / "two"
    config = configuration(two, hostfile=str(hostfile))
    train_on_one_host(configuration(one))

    start = ["ip", "netns", "exec", names[0], sys.executable, "-m", "declip_train", str(config)]
    # A host that is not there is named before anything starts.
    hostfile.write_text(f"{addresses[0]} slots=1\n10.254.77.9 slots=1\n")
    options = os.environ["OPENDECLIP_SSH"] + " -o ConnectTimeout=1"
    quick = {**environment(), "OPENDECLIP_SSH": options}
    refused = subprocess.run(start, env=quick, capture_output=True, check=False, timeout=120)
    assert refused.returncode == ENDED_EARLY
    assert b"host 10.254.77.9 cannot be reached over ssh" in refused.stderr
    assert losses(two) == []

    hostfile.write_text("".join(f"{address} slots=1\n" for address in addresses))
    done = subprocess.run(start, env=environment(), capture_output=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr.decode()
    assert losses(two) == losses(one)
    weights = [file_digest(next((r / "train" / "export").glob("*.bin"))) for r in (one, two)]
    assert weights[0] == weights[1]
    logs = {path.name for path in (two / "train").glob("launch*.log")}
    assert logs == {"launch.log", "launch.host_00001.log"}
