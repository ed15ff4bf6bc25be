"""Stands in for ssh in tests of many machines: every host is this one, and has a character.

``fake_ssh.py -o OPTION ... HOST COMMAND``: questions are answered by the real command; an agent is
played, as the host's name says.
"""

from __future__ import annotations

import os
import subprocess
import sys


def play(character: str) -> int:
    """An agent: ``done`` trains to the end, ``good`` until it is told to stop, ..."""
    sys.stdin.readline()
    print(f"{character} is up", flush=True)
    if character == "done":
        return 0
    if character == "stalled":
        print("declip_train: error: stalled: process 1 hangs", flush=True)
        return 75
    if character == "faulty":
        print("declip_train: error: 0 of 9 samples are left.", flush=True)
        return 1
    if character == "died":
        print("declip_train: error: training ended with status -9: it said nothing", flush=True)
        return 75
    if character == "preempted":
        return 143
    if character == "lost":
        print("Connection to lost closed by remote host.", flush=True)
        return 255
    for line in sys.stdin:
        print(f"{character} was told {line.strip()}", flush=True)
        if character == "good" or line.strip() == "now":
            return 143
    return 143


def main() -> int:
    """Do as the command line says."""
    host, command = sys.argv[-2:]
    if host == "away":
        print("ssh: connect to host away port 22: No route to host", file=sys.stderr)
        return 255
    if host == "bare":
        print("sh: exec: python: not found", file=sys.stderr)
        return 127
    if command.endswith("multi_node agent"):
        return play(host)
    environment = {**os.environ, "SSH_CONNECTION": "127.0.0.1 5 127.0.0.1 22"}
    return subprocess.run(["/bin/sh", "-c", command], env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
