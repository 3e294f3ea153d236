"""A `python` that has imported torch already: each command is run by a fork of one process, so that it starts at once.

A page of the documentation has up to twenty commands, and most of their time is the import. What cannot run this way (`-c`,
`-`, another system than Linux) the interpreter runs as usual.

    python warm_python.py SOCKET            serves, until its standard input ends
    python warm_python.py SOCKET ARGUMENT.. sends arguments, folder, environment and streams there; exits as the fork does
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NoReturn


@contextmanager
def warm_python(path: str, environment: Mapping[str, str]) -> Iterator[str]:
    """Serve at the socket `path`; the value is the text of a shell script that is to be called as `python`."""
    script = f'exec "{sys.executable}" "$@"\n'
    if sys.platform != "linux":
        yield "#!/bin/sh\n" + script
        return
    here = os.path.abspath(__file__)
    warm = f'case "$1" in -m|*.py) exec "{sys.executable}" -I -S "{here}" "{path}" "$@";; esac\n'
    command = [sys.executable, here, path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=dict(environment)) as server:
        assert server.stdin is not None and server.stdout is not None and server.stdout.readline() == b"ready\n"
        yield "#!/bin/sh\n" + warm + script
        server.stdin.close()


def serve(path: str) -> None:
    """Fork for each request at the socket `path`."""
    del sys.path[0]  # this file's folder, in which gpt2 is a folder of tests
    import numpy.random  # noqa: F401

    import gpt2.finetuning
    import gpt2.generation
    import gpt2.inspection
    import gpt2.training  # noqa: F401
    from gpt2.cli.group import COMMAND_NAMES, load_command
    from gpt_test.gpt2.training.forked import import_modules

    import_modules()
    for name in COMMAND_NAMES:
        load_command(name)
    gc.freeze()  # the garbage collector of a fork would look through all of these objects
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(path)
    listener.listen()
    print("ready", flush=True)
    while True:
        if sys.stdin in select.select([listener, sys.stdin], [], [])[0]:
            return
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            answer(connection)
            return
        connection.close()


def answer(connection: socket.socket) -> None:
    """Run one request in a fork and send its status when it has ended: then all that it writes at its end is written."""
    text, streams, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    request = json.loads(text)
    child = os.fork()
    if child == 0:
        connection.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["environment"])
        leave(request["arguments"])
    connection.send(str(child).encode())
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    connection.send(str(status if status >= 0 else 128 - status).encode())
    os._exit(0)


def leave(arguments: list[str]) -> NoReturn:
    """Run `arguments` and exit as an interpreter does, but do not delete the modules first: that takes 0.2 seconds."""
    status = 0
    try:
        run(arguments)
    except SystemExit as ending:
        if isinstance(ending.code, int):
            status = ending.code
        elif ending.code is not None:
            print(ending.code, file=sys.stderr)
            status = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    threading._shutdown()  # waits for the threads that are no daemons
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            status = 120
    os._exit(status & 0xFF)


def run(arguments: list[str]) -> None:
    """Run `-m MODULE ...` or `SCRIPT.py ...` in this process."""
    import runpy

    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, os.path.dirname(os.path.abspath(arguments[0])))
        runpy.run_path(arguments[0], run_name="__main__")


def ask(path: str, arguments: list[str]) -> int:
    """Have the server run `arguments` with this process's streams, and pass SIGTERM on to them; return the status."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(path)
    request = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
    socket.send_fds(connection, [json.dumps(request).encode()], [0, 1, 2])
    child = int(connection.recv(16))
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGTERM))
    return int(connection.recv(16) or 1)


if __name__ == "__main__":
    if sys.argv[2:]:
        sys.exit(ask(sys.argv[1], sys.argv[2:]))
    serve(sys.argv[1])
