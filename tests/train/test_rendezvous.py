"""Where the processes of a run meet, nobody else is heard."""

import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from declip_shards import DeclipError
from declip_train.rendezvous import listen_at

if TYPE_CHECKING:
    from tests.train.rendezvous_workers import meet
    from tests.train.several_processes import run_processes
else:
    sys.path.insert(0, str(Path(__file__).parent))
    from rendezvous_workers import meet
    from several_processes import run_processes

LOOPBACK = "0100007F"


def test_a_port_is_opened_on_one_address():
    with listen_at("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            pass
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.2", port), timeout=5)
        with pytest.raises(DeclipError) as raised:
            listen_at("127.0.0.1", port)
        assert f"cannot listen at 127.0.0.1:{port} (" in str(raised.value)
        assert "give another port" in str(raised.value)
    with pytest.raises(DeclipError, match="an address of its own machine"):
        listen_at("192.0.2.1", port)


@pytest.mark.distributed
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/net")
def test_a_machine_alone_listens_to_itself(tmp_path):
    with listen_at("127.0.0.1", 0) as probe:
        port = probe.getsockname()[1]
    run_processes(meet, 2, str(port), str(tmp_path))
    told = [(tmp_path / f"told_{rank}").read_text() for rank in range(2)]
    assert told == [f"3.0 ['{LOOPBACK}']"] * 2
