"""What a sealed process cannot do, in a process of its own."""

import subprocess
import sys

import pytest

TRIES = """
import os, socket
from densedino.serve.seal import seal
held = open("/proc/self/status")
print(seal(memory=2**31))
def attempt(name, function):
    try:
        function()
        print(name, "done")
    except BaseException as error:
        print(name, type(error).__name__)
attempt("read", lambda: open("/etc/hostname"))
attempt("write", lambda: open("/tmp/densedino-sealed", "w"))
attempt("socket", lambda: socket.socket())
attempt("program", lambda: os.execv("/bin/true", ["true"]))
attempt("kill", lambda: os.kill(os.getppid(), 0))
attempt("memory", lambda: bytearray(2**32))
attempt("compute", lambda: sum(range(10)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="seccomp is Linux's")
def test_a_sealed_process_has_no_files_no_network_no_programs():
    done = subprocess.run([sys.executable, "-c", TRIES], capture_output=True, text=True, timeout=60, check=True)
    sealed, *lines = done.stdout.splitlines()
    assert sealed == "True"
    assert dict(line.split() for line in lines) == {
        "read": "PermissionError",
        "write": "PermissionError",
        "socket": "PermissionError",
        "program": "PermissionError",
        "kill": "PermissionError",
        "memory": "MemoryError",
        "compute": "done",
    }
