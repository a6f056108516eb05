"""Where the processes of a run meet: a process beside process 0, started by the path of this file.

It calls the roll, which JAX's coordination service would end by aborting them all where one is
missing or two claim one number, and then runs that service. In a process of its own the service
outlives process 0 by some seconds, in which the others can say why they end. Process 0 writes lines
of JSON to its standard input and reads one for each; nothing but jaxlib is imported, and that late.
"""

import contextlib
import errno
import ipaddress
import json
import os
import select
import socket
import sys
import time
from typing import Any, NamedTuple

HELLO_BYTES, HELLO_S = 1000, 5.0  # at most, of a process that says who it is
PAUSE_S = 0.2  # between tries to reach the coordinator


class Answer(NamedTuple):
    """What a process hears that has come.

    Attributes:
        problem: what is wrong, if anything.
        differs: whether that is a process which was told another number of processes.
        address: by which others reach this machine.
    """

    problem: str | None
    differs: bool
    address: str


def call_roll(listener: socket.socket, count: int, patience_s: float) -> bool:
    """Waits until processes 0 to `count` - 1 have come, and answers all who came.

    Returns:
        Whether all is well.
    """
    came: list[tuple[socket.socket, str]] = []
    where: dict[int, str] = {}
    problem, differs = None, False
    until = time.monotonic() + patience_s
    while problem is None and len(where) < count:
        left = until - time.monotonic()
        ready, _, _ = select.select([listener, sys.stdin], [], [], max(0.0, left))
        if not ready:
            missing = sorted(set(range(count)) - set(where))
            problem = f"of {count} processes {_numbers(missing)} did not come in {patience_s:g} s"
        elif listener not in ready:  # process 0 is gone
            sys.exit(1)
        else:
            connection, address = listener.accept()
            name = _name(address)
            came.append((connection, name))
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                connection.settimeout(HELLO_S)
                told = json.loads(connection.recv(HELLO_BYTES))
                index, of = told["process_id"], told["num_processes"]
                if differs := of != count:
                    problem = f"process {index} was started as one of {of}, process 0 of {count}"
                elif index in where:
                    problem = f"two claim number {index}, at {where[index]} and {name}"
                where[index] = name
    # Who is on this machine may have come by an address that leads others nowhere.
    outside = (_name(c.getsockname()) for c, name in came if not _is_loopback(name))
    here = next(outside, None)
    for connection, name in came:
        told = Answer(problem, differs, (_is_loopback(name) and here) or name)
        with contextlib.suppress(OSError):
            connection.sendall(json.dumps(told).encode())
        connection.close()
    return problem is None


def answer_roll(host: str, port: int, index: int, count: int, patience_s: float) -> Answer:
    """Called by each process: tells the coordinator that it has come."""
    until = time.monotonic() + patience_s
    while True:
        left = max(PAUSE_S, until - time.monotonic())
        try:
            with socket.create_connection((host, port), timeout=left) as connection:
                hello = {"process_id": index, "num_processes": count}
                connection.sendall(json.dumps(hello).encode())
                connection.settimeout(patience_s + HELLO_S)
                return Answer(*json.loads(connection.makefile().read()))
        except (ValueError, TypeError):
            error = "something else answers there, perhaps another run"
        except OSError as failure:
            error = str(failure)
        if time.monotonic() + PAUSE_S > until:
            return Answer(f"no coordinator was found in {patience_s:g} s: {error}", False, "")
        time.sleep(PAUSE_S)


def _name(address: Any) -> str:
    return address[0].removeprefix("::ffff:")


def _is_loopback(name: str) -> bool:
    return ipaddress.ip_address(name.partition("%")[0]).is_loopback


def _numbers(missing: list[int]) -> str:
    shown = ", ".join(map(str, missing[:10]))
    return shown + ", …" * (len(missing) > 10)


def _listen(port: int, patience_s: float) -> socket.socket:
    """On all addresses of this machine, as JAX's service does.

    Raises:
        OSError: others do, and not only the service of a run whose process 0 was just killed.
    """
    dual = socket.has_dualstack_ipv6()
    how: Any = {"family": socket.AF_INET6, "dualstack_ipv6": True} if dual else {}
    until = time.monotonic() + patience_s
    while True:
        try:
            return socket.create_server(("", port), **how)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > until:
                raise
            time.sleep(PAUSE_S)


def main() -> None:
    """Does what process 0 asks for, line by line, until that is gone."""

    def hear() -> Any:
        return json.loads(sys.stdin.readline() or "null")

    def say(what: Any) -> None:
        print(json.dumps(what), flush=True)

    port, count, patience_s, linger_s = hear()
    try:
        listener = _listen(port, linger_s + PAUSE_S)
    except OSError as error:
        return say(f"cannot listen at port {port} ({os.strerror(error.errno or 0)})")
    say(None)
    with listener:
        all_came = call_roll(listener, count, patience_s)
    asked = hear() if all_came else None
    if asked is None:
        return None
    import jaxlib._jax

    arguments, options = asked
    try:
        service = jaxlib._jax.get_distributed_runtime_service(*arguments, **options)
    except RuntimeError as error:
        return say(str(error).partition("\n")[0])
    say(None)
    if hear() is None:
        time.sleep(linger_s)
    else:
        service.shutdown()
    return None


if __name__ == "__main__":
    main()
