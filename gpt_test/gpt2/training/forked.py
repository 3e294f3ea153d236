"""Start test runs as processes of their own, forked from a server that has already imported torch, which takes seconds.

A forked run has its own environment, signals and exit status, and its interpreter exits like one that a shell has started.
Forking a process with torch is safe on Linux only, so elsewhere each run is a new interpreter.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
# The modules that runs import, at the start or later. The first two are imported by torch's optimizers.
MODULES = (
    "torch._dynamo", "torch.onnx", "torch.distributed.fsdp", "gpt2.cli.train", "gpt2.cli.finetune", "gpt2.finetuning.run",
)  # fmt: skip


def start_run(
    arguments: Sequence[object], module: str = "gpt2", *, is_measured: bool = True, **environment: str
) -> Run | subprocess.Popen[str]:
    """Start `python -m MODULE ARGUMENTS` and return the process. Its stderr is a pipe.

    Set `is_measured` to False for a run that is killed or fills its disk, because it would damage the data file of coverage.
    """
    words = list(map(str, arguments))
    full = {**_environment(is_measured), "PYTHONPATH": str(ROOT), **environment}
    if sys.platform != "linux":
        return subprocess.Popen([sys.executable, "-m", module, *words], stderr=subprocess.PIPE, text=True, env=full)
    is_measured |= "COVERAGE_PROCESS_START" not in os.environ  # without coverage, one server is enough
    return _server(is_measured).start({"argv": [module, *words], "environment": full, "folder": os.getcwd()})


def _environment(is_measured: bool) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if is_measured or not name.startswith("COVERAGE_")}
    return {**kept, "OMP_NUM_THREADS": "1"}


@functools.cache
def _server(is_measured: bool) -> ForkServer:
    server = ForkServer(_environment(is_measured))
    atexit.register(server.close)
    return server


class Run:
    """A forked run. It has the members of `subprocess.Popen` that the tests use."""

    def __init__(self, stderr: int, status: int) -> None:
        self._status = os.fdopen(status, "rb", buffering=0)
        self.stderr = os.fdopen(stderr, encoding="utf-8", errors="replace")
        self.pid = int(self._status.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            self.returncode = int(self._status.readline())
        return self.returncode

    def communicate(self, timeout: float = 120) -> tuple[None, str]:
        deadline, err = time.monotonic() + timeout, b""
        while select.select([self.stderr], [], [], deadline - time.monotonic())[0]:
            part = os.read(self.stderr.fileno(), 1 << 16)
            if not part and select.select([self._status], [], [], deadline - time.monotonic())[0]:
                self.poll()
                return None, err.decode("utf-8", errors="replace")
            err += part
        self.kill()
        raise subprocess.TimeoutExpired(f"run {self.pid}", timeout, stderr=err)

    def wait(self, timeout: float = 120) -> int | None:
        self.communicate(timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def close(self) -> None:
        """Kill the run if it has not ended, and close its pipes."""
        self.kill()
        self.stderr.close()
        self._status.close()


class ForkServer:
    """The server as the tests see it: they send it requests, and get runs."""

    def __init__(self, environment: dict[str, str]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno())], pass_fds=[theirs.fileno()], cwd=ROOT,
                env=environment, stdout=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        self._socket = ours
        self._runs: list[Run] = []

    def start(self, request: dict[str, Any]) -> Run:
        (stderr, their_stderr), (status, their_status) = os.pipe(), os.pipe()
        socket.send_fds(self._socket, [json.dumps(request).encode()], [their_stderr, their_status])
        os.close(their_stderr)
        os.close(their_status)
        self._runs.append(Run(stderr, status))
        return self._runs[-1]

    def close(self) -> None:
        for run in self._runs:
            run.close()
        self._socket.close()
        self._process.wait()


def serve(connection: socket.socket) -> tuple[dict[str, Any], int] | None:
    """Fork a process for each request. Returns (request, descriptor of its stderr) in each forked process, and None in the
    server when the tests have ended.

    The parent of a forked process is a guard, a process that waits for it and reports its exit status.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the server does not wait for the guards
    while True:
        message, descriptors, *_ = socket.recv_fds(connection, 1 << 20, 2)
        if not message:
            return None
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            stderr, status = descriptors
            connection.close()
            pid = os.fork()
            if pid == 0:
                os.close(status)
                return json.loads(message), stderr
            os.close(stderr)
            with contextlib.suppress(BrokenPipeError):
                os.write(status, b"%d\n" % pid)
                os.write(status, b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)


def import_modules() -> None:
    """Import `MODULES`. This starts no thread, because a forked process would not have it."""
    for name in MODULES:
        importlib.import_module(name)
    from gpt2.training.progress import plot_losses

    with tempfile.TemporaryDirectory() as folder:  # matplotlib reads all fonts at the first plot
        (Path(folder) / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
        plot_losses(Path(folder))


if __name__ == "__main__":
    import_modules()
    gc.freeze()  # imported objects stay, so the garbage collector of a run can skip them
    request = serve(socket.socket(fileno=int(sys.argv[1])))
    if request is not None:
        options, stderr = request
        os.dup2(stderr, 2)
        os.close(stderr)
        sys.stderr = os.fdopen(2, "w", 1, "utf-8", "backslashreplace", closefd=False)
        os.environ.clear()
        os.environ.update(options["environment"])
        os.chdir(options["folder"])
        sys.argv = options["argv"]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
