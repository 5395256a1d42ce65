"""The guest's own process: a live Python interpreter, started once, frozen and forked ever after.

Runs inside the box, together with the guest's code: nothing here is trusted by the supervisor. Between turns the
process has one thread, standard streams on /dev/null and one socket to the supervisor; a copy forked at a snapshot
waits on a socket of its own and does nothing but fork.
"""

from __future__ import annotations

import ast
import builtins
import errno
import gc
import linecache
import operator
import os
import signal
import socket
import subprocess
import sys
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from . import areas, carry, kernel, renew
from .wire import DONE, FORK, FREEZE, NOT_PLAIN, WireError, receive, send

Fork = Callable[[], int]

_hooked = False


def main(fd: int) -> NoReturn:
    """Serve the supervisor behind the socket `fd` until it is gone."""
    kernel.let_no_program_inherit()
    connection = socket.socket(fileno=fd)
    fresh = types.ModuleType("__main__")
    fresh.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = fresh
    sys.path.insert(0, "")
    sys.argv = [""]
    vars(sys)["addaudithook"] = _add_audit_hook(sys.addaudithook)
    gc.collect()
    gc.freeze()
    areas.join()
    modules = len(sys.modules)
    usual = _run_by_a_program()
    fork = kernel.sibling_fork()
    waiting: carry.Carried | None = None  # what is to be adopted before anything else is done
    try:
        send(connection, {"ready": os.getpid()})
        receive(connection)
        os.chdir("/workspace")
        while True:
            message, fds = receive(connection)
            if waiting is not None:
                carry.adopt(waiting)
                waiting = None
            if message["op"] == FREEZE:
                connection, waiting = _freeze_plain(connection, fds[0], fork)
            elif message["op"] == "freeze":
                connection = _freeze(connection, fds[0], fork)
            else:
                answer = _run(message, fds[0], fresh.__dict__, usual)
                if len(sys.modules) > modules:  # they may have brought libraries
                    modules = len(sys.modules)
                    areas.join()
                send(connection, answer)  # from here on it waits: the supervisor may look at it
    except (WireError, OSError, LookupError):
        os._exit(0)


def _add_audit_hook(add: Callable[[Any], None]) -> Callable[[Any], None]:
    """The same function, which leaves a note: hooks cannot be listed."""

    def addaudithook(hook: Any) -> None:
        global _hooked
        _hooked = True
        add(hook)

    return addaudithook


def _run_by_a_program() -> list[object]:
    """Everything of this interpreter that a call of another program runs and that the agent could have replaced."""
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    monitoring = getattr(sys, "monitoring", None)  # from Python 3.12 on
    tools = [monitoring.get_tool(number) for number in range(6)] if monitoring else []
    hooks = [_hooked, sys.gettrace(), sys.getprofile(), len(gc.callbacks), sys.stdout, sys.stderr, *handlers, *tools]
    return [*hooks, *vars(os).values(), *vars(subprocess).values(), *vars(subprocess.Popen).values()]


def _collections() -> int:
    return sum(generation["collections"] for generation in gc.get_stats())


def _run(message: dict[str, Any], out: int, space: dict[str, Any], usual: list[object]) -> dict[str, Any]:
    """Run what is asked for; the answer, "quiet" when nothing but another program has run: no hook, no handler, no
    finalizer of the agent's in this interpreter.
    """
    collected, now = _collections(), _run_by_a_program()
    quiet = len(now) == len(usual) and all(map(operator.is_, now, usual))
    sys.stdout.flush()
    for stream in (1, 2):
        os.dup2(out, stream)
    os.close(out)
    answer: dict[str, Any] = {"status": 0}
    try:
        if message["op"] == "python":
            _python(message["code"], space, bool(message["show"]))
        elif message["op"] == "fresh":
            answer["status"] = _fresh(message["code"])
        else:
            answer["status"] = _shell(message["code"])
    except SystemExit as leaving:
        answer["status"] = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        if isinstance(leaving.code, str):
            sys.stderr.write(leaving.code + "\n")
    except BaseException as error:
        answer["status"] = 1
        _show(error)
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except Exception:
        pass
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (1, 2):
        os.dup2(nothing, stream)
    os.close(nothing)
    return {**answer, "quiet": int(quiet and collected == _collections())}


def _python(code: str, space: dict[str, Any], show: bool) -> None:
    """Run statements; `show`: the value of a last expression, as at a prompt."""
    name = "<agent>"
    linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
    tree = ast.parse(code, name)
    end = tree.body[-1] if tree.body else None
    last = None
    if show and isinstance(end, ast.Expr):
        last = ast.Expression(end.value)
        tree.body.pop()
    exec(compile(tree, name, "exec"), space)  # noqa: S102  (what this process is for)
    if last is not None:
        value = eval(compile(last, name, "eval"), space)  # noqa: S307
        if value is not None:
            space["_"] = value
            print(repr(value))  # noqa: T201


def _show(error: BaseException) -> None:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    lines = traceback.format_exception_only(error)
    if frames:
        lines = ["Traceback (most recent call last):\n", *traceback.format_list(frames), *lines]
    sys.stderr.write("".join(lines))


def _shell(code: str) -> int:
    shell = "/bin/bash" if Path("/bin/bash").exists() else "/bin/sh"
    with subprocess.Popen([shell, "-c", code], stdin=subprocess.DEVNULL) as process:
        return process.wait()


def _fresh(code: str) -> int:
    with subprocess.Popen([sys.executable, "-B", "-"], stdin=subprocess.PIPE) as process:
        process.communicate(code.encode())
        return process.returncode


def _freeze_plain(connection: socket.socket, other: int, fork: Fork) -> tuple[socket.socket, carry.Carried | None]:
    """Leave a frozen copy of this process, which the supervisor has found to hold nothing that a fork would share;
    the socket to go on with, and what to adopt before the next request: by then the layers are attached.
    """
    carried = carry.plain()
    if carried is None:
        os.close(other)
        connection.send(NOT_PLAIN)
        return connection, None
    try:
        child = fork()
    except OSError:  # too many processes: the other way says so in words
        os.close(other)
        connection.send(NOT_PLAIN)
        return connection, None
    if child == 0:
        connection.close()
        os.setsid()
        os.chdir("/")  # whoever goes on may remove the folder: one that is still used keeps its layer from being frozen
        kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
        connection = _template(_socket(other), fork)
        return connection, carry.again(carried)
    connection.send(DONE)
    os.close(other)
    return connection, carried


def _freeze(connection: socket.socket, other: int, fork: Fork) -> socket.socket:
    """The same for a process that holds files, pipes, shared memory: each is carried over, or the snapshot refused."""
    sys.stdout.flush()
    try:
        carried, reasons = carry.inspect(frozenset((connection.fileno(), other)))
    except Exception as error:  # whatever it is, the guest goes on
        carried, reasons = carry.Carried(), [f"a process that cannot be looked into ({error})"]
    child = -1
    if not reasons:
        try:
            child = fork()
        except OSError as error:
            reasons = [f"no room for another process ({error.strerror})"]
    if reasons:
        os.close(other)
        send(connection, {"refused": reasons})
        return connection
    if child == 0:
        connection.close()
        connection = _socket(other)
        os.setsid()
        try:
            carry.settle(carried)
        except OSError as error:
            send(connection, {"refused": [str(error)]})
            os._exit(0)
        os.chdir("/")
        kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
        send(connection, {"op": "frozen"})
        connection = _template(connection, fork)
        carried = carry.again(carried)
    else:
        os.close(other)
        connection.send(DONE)
    receive(connection)
    try:
        carry.adopt(carried)
        send(connection, {"op": "ready"})
    except OSError as error:
        send(connection, {"refused": [f"what was open could not be opened again ({error})"]})
    return connection


def _socket(fd: int) -> socket.socket:
    """The socket behind a descriptor; its kind is said, since finding it out takes three more system calls."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fd)


def _template(connection: socket.socket, fork: Fork) -> socket.socket:
    """The frozen copy's life: forks on request, and nothing else. Returns in a fork, in a mount namespace of its own,
    with the fork's socket.
    """
    try:
        while True:
            message, fds = receive(connection)
            try:
                child = fork()
            except OSError as error:  # too many processes: whoever asked may ask again
                with _socket(fds[0]) as asked:
                    asked.send(str(-(error.errno or errno.EAGAIN)).rjust(8).encode())
                continue
            if child == 0:
                connection.close()
                connection = _socket(fds[0])
                if message["op"] == FORK:
                    os.setsid()
                    kernel.unshare(kernel.NEW_MOUNT)
                    connection.send(str(os.getpid()).rjust(8).encode())
                    return connection
                renew.refresh()
                connection.send(str(os.getpid()).rjust(8).encode())
            else:
                os.close(fds[0])
    except (WireError, OSError, LookupError):
        os._exit(0)
