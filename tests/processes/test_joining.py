"""How processes find each other, and how those that cannot be one run are refused."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading

import pytest
import several

from mnist_jax import Config
from mnist_jax.errors import UsageError
from mnist_jax.parallel import coordinator, processes
from mnist_jax.parallel.team import Team


def roll(*claims: tuple[int, int], count: int, patience_s: float = 20.0):
    """What each who claims to be (number, of) is told by the coordinator of `count` processes."""
    return roll_at(["localhost"] * len(claims), claims, count, patience_s)


def roll_at(hosts, claims, count, patience_s=20.0) -> list[coordinator.Answer]:
    """As `roll`, with the address at which each looks for the coordinator."""
    found: dict[int, coordinator.Answer] = {}
    read, write = os.pipe()  # process 0's hand, which holds still
    with socket.create_server(("", 0)) as listener, os.fdopen(read) as stdin:
        port = listener.getsockname()[1]

        def answer(place: int, index: int, of: int) -> None:
            found[place] = coordinator.answer_roll(hosts[place], port, index, of, patience_s)

        threads = [threading.Thread(target=answer, args=(n, *c)) for n, c in enumerate(claims)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdin", stdin)
            for thread in threads:
                thread.start()
            all_came = coordinator.call_roll(listener, count, patience_s)
        for thread in threads:
            thread.join()
    os.close(write)
    answers = [found[n] for n in range(len(claims))]
    assert all_came == all(answer.problem is None for answer in answers)
    return answers


def problems(answers: list[coordinator.Answer]) -> set[tuple[str | None, bool]]:
    return {(answer.problem, answer.differs) for answer in answers}


def test_all_who_come_are_told_that_all_is_well():
    assert problems(roll((0, 3), (2, 3), (1, 3), count=3)) == {(None, False)}


@pytest.mark.skipif(sys.platform != "linux", reason="only there is all of 127 this machine")
def test_who_is_on_the_coordinators_machine_gives_an_address_that_others_know(monkeypatch):
    """127.0.0.1 stands for the way inside a machine, and 127.0.0.3 for its name outside."""
    monkeypatch.setattr(coordinator, "_is_loopback", lambda name: name == "127.0.0.1")
    connect = socket.create_connection

    def connect_from_outside(address, timeout):
        source = ("127.0.0.2", 0) if address[0] == "127.0.0.3" else None
        return connect(address, timeout, source)

    monkeypatch.setattr(socket, "create_connection", connect_from_outside)
    hosts, claims = ["127.0.0.1", "127.0.0.1", "127.0.0.3"], [(0, 3), (1, 3), (2, 3)]
    addresses = [answer.address for answer in roll_at(hosts, claims, 3)]
    assert addresses == ["127.0.0.3", "127.0.0.3", "127.0.0.2"]


def test_two_that_claim_one_number_are_told_and_so_are_the_others():
    told = problems(roll((0, 3), (1, 3), (1, 3), count=3))
    assert told == {("two claim number 1, at 127.0.0.1 and 127.0.0.1", False)}


def test_one_that_was_told_of_another_number_of_processes():
    told = problems(roll((1, 3), count=2))
    assert told == {("process 1 was started as one of 3, process 0 of 2", True)}


def test_those_that_do_not_come_are_named():
    told = problems(roll((0, 4), (2, 4), count=4, patience_s=0.5))
    assert told == {("of 4 processes 1, 3 did not come in 0.5 s", False)}


@pytest.mark.parametrize("hello", [b"", b"\0\xff", b"[]", b"{}", b'{"process_id": 1}', b"7"])
def test_a_stranger_at_the_port_changes_nothing(hello):
    with socket.create_server(("localhost", 0)) as listener:
        address = listener.getsockname()

        def come():
            with contextlib.closing(socket.create_connection(address)) as stranger:
                stranger.sendall(hello)
            coordinator.answer_roll(*address, 0, 1, 20.0)

        thread = threading.Thread(target=come)
        read, write = os.pipe()
        with pytest.MonkeyPatch.context() as patch, os.fdopen(read) as stdin:
            patch.setattr(sys, "stdin", stdin)
            thread.start()
            assert coordinator.call_roll(listener, 1, 20.0)
        os.close(write)
        thread.join()


def test_a_coordinator_that_is_not_there_is_given_up():
    problem = coordinator.answer_roll("localhost", several.free_port(), 1, 2, 0.5).problem
    assert problem is not None
    assert problem.startswith("no coordinator was found in 0.5 s: ")
    problem = coordinator.answer_roll("no.such.host.invalid", 1, 1, 2, 0.1).problem
    assert problem is not None


def one_line(ended: several.Ended) -> str:
    assert ended.err.count("\n") == 1 and ended.err.startswith("error: "), ended
    return ended.err


def test_a_process_alone_is_refused_in_bounded_time():
    setup = "p.JOIN_S, p.WAITING_S = 3, 1"
    numbers = f"--coordinator=localhost:{several.free_port()}", "--num_processes=2"
    first, second = (
        several.ends([several.start(*several.FLAGS, *numbers, f"--process_id={n}", setup=setup)])[0]
        for n in (0, 1)
    )
    assert (first.status, second.status) == (6, 6)
    address = numbers[0].partition("=")[2]
    for number, (ended, problem) in enumerate(
        [
            (first, "of 2 processes 1 did not come in 3 s; check that all are started"),
            (second, "no coordinator was found in 3 s"),
        ]
    ):
        notice, error = ended.err.splitlines()
        assert notice == f"notice: process {number} of 2 is waiting for the others at {address}"
        assert error.startswith("error: ") and problem in error


def test_a_port_in_use_is_refused():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        flags = f"--coordinator=localhost:{port}", "--num_processes=2", "--process_id=0"
        [ended] = several.ends([several.start(*several.FLAGS, *flags, setup="p.LOST_S = -5")])
    assert ended.status == 6
    assert re.search(rf"cannot listen at port {port} \(.*\); start one process 0", one_line(ended))


def test_processes_with_other_flags_are_refused_by_all(data_dir, tmp_path):
    flags = *several.FLAGS, f"--data_dir={data_dir}", f"--workdir={tmp_path / 'run'}"
    numbers = f"--coordinator=localhost:{several.free_port()}", "--num_processes=2"
    started = [
        several.start(*flags, *numbers, "--process_id=0"),
        several.start(*flags, *numbers, "--process_id=1", "--seed=7", "--learning_rate=0.5"),
    ]
    for ended in several.ends(started):
        assert ended.status == 2
        line = one_line(ended)
        assert "process 1 differs from process 0 in " in line
        assert "seed (7, in process 0 1234)" in line and "learning_rate (0.5, " in line
    assert not (tmp_path / "run" / "config.json").exists()


def test_processes_told_of_another_number_are_refused_by_all():
    address = f"--coordinator=localhost:{several.free_port()}"
    started = [
        several.start(*several.FLAGS, address, f"--num_processes={count}", f"--process_id={number}")
        for number, count in enumerate((2, 3))
    ]
    for ended in several.ends(started):
        assert ended.status == 2
        line = one_line(ended)
        assert "process 1 was started as one of 3, process 0 of 2; start all with the same" in line


def on_another_disk(folder) -> tuple[str, ...]:
    """What runs a program for which this folder is another, empty one."""
    mount = 'mount -t tmpfs none "$0" && exec "$@"'
    prefix = "unshare", "--mount", "sh", "-c", mount, str(folder)
    if shutil.which("unshare") is None or subprocess.run([*prefix, "true"], check=False).returncode:
        pytest.skip("needs the right to mount")
    return prefix


def test_folders_that_are_not_shared_are_found_at_the_start(data_dir, tmp_path):
    flags = *several.FLAGS, f"--data_dir={data_dir}", f"--workdir={tmp_path / 'run'}", "--epochs=1"
    prefix = on_another_disk(tmp_path)

    def run(*prefixes):
        numbers = f"--coordinator=localhost:{several.free_port()}", "--num_processes=2"
        return several.ends(
            [
                several.start(*flags, *numbers, f"--process_id={number}", prefix=prefix)
                for number, prefix in enumerate(prefixes)
            ]
        )

    first, second = run((), prefix)
    assert (first.status, second.status) == (0, 0)
    assert "only the machine of process 0 has the folder" in first.out + first.err
    assert second.err == ""
    for ended in run(prefix, ()):  # process 0 is started where the run is not
        assert ended.status == 2
        assert f"the machine of process 1 holds a run in {tmp_path}" in one_line(ended)


class Answers:
    """In place of the key-value store, with what the others say."""

    def __init__(self, *others):
        self.others, self.said = others, {}

    def key_value_set(self, key, text, *_):
        self.said[key] = text

    def key_value_delete(self, key):
        self.said.pop(key, None)

    def blocking_key_value_get(self, key, _):
        return self.said.get(key) or json.dumps(self.others[int(key.rpartition("/")[2]) - 1])


def team_of_two(client, index: int = 0) -> Team:
    team = Team()
    team.index, team.count, team._client = index, 2, client
    return team


def test_a_second_run_of_the_same_processes_hears_nothing_of_the_first():
    client = Answers()
    for said in ("first", "second"):
        assert team_of_two(client).decide(said) == said
    assert sorted(map(json.loads, client.said.values())) == ["first", "second"]


def test_other_versions_are_refused():
    team = team_of_two(Answers({"jax": "0.11.2", "seed": 1}))
    with pytest.raises(UsageError, match=r"process 1 differs .* in jax \('0.11.2', in process 0 '"):
        team.check_same({"jax": "0.12.0", "seed": 1})


SECOND_OF_TWO = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_NODELIST": "node7",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
}


@pytest.fixture
def launcher(monkeypatch):
    """Sets what a launcher would, and nothing of what started these tests."""

    def set_all(**variables: str) -> None:
        for name in list(os.environ):
            if name.startswith(("SLURM_", "OMPI_")):
                monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    set_all()
    return set_all


def test_open_mpi_says_who_they_are(launcher):
    launcher(
        OMPI_MCA_orte_hnp_uri="1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
        OMPI_COMM_WORLD_SIZE="8",
        OMPI_COMM_WORLD_RANK="5",
        OMPI_COMM_WORLD_LOCAL_RANK="1",
    )
    address, count, index, devices = processes.launched()
    host, port = address.split(":")
    assert (host, count, index, devices) == ("10.96.0.1", 8, 5, [1])
    assert 1024 < int(port) < 65536


def test_slurm_says_who_they_are(launcher):
    launcher(
        SLURM_JOB_ID="1234",
        SLURM_STEP_NODELIST="node[03-04,7]",
        SLURM_NTASKS="3",
        SLURM_PROCID="2",
        SLURM_LOCALID="0",
    )
    address, count, index, devices = processes.launched()
    assert (address.split(":")[0], count, index, devices) == ("node03", 3, 2, [0])


def test_open_mpi_5_which_does_not_say_it_all_is_named(launcher):
    named = {"SIZE": "8", "RANK": "5", "LOCAL_RANK": "1"}
    launcher(**{f"OMPI_COMM_WORLD_{name}": value for name, value in named.items()})
    with pytest.raises(UsageError, match=r"Open MPI from version 5 .*--process_id=\$OMPI_COMM_WOR"):
        processes.launched()


def test_the_devices_of_a_process_can_be_named(launcher, monkeypatch):
    launcher(**SECOND_OF_TWO)
    assert processes.launched()[3] == [1]
    monkeypatch.setenv("JAX_LOCAL_DEVICE_IDS", "0,1,2,3")
    assert processes.launched()[3] == [0, 1, 2, 3]
    monkeypatch.setenv("JAX_LOCAL_DEVICE_IDS", "0;1")
    with pytest.raises(
        UsageError, match="JAX_LOCAL_DEVICE_IDS is '0;1'; allowed are whole numbers"
    ):
        processes.launched()


def test_an_address_that_is_none_is_refused(launcher, monkeypatch):
    launcher(**SECOND_OF_TWO)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "node7:none")
    with pytest.raises(UsageError, match="coordinator's address is 'node7:none'; allowed is"):
        processes.launched()


def test_without_a_launcher_auto_is_refused(launcher, capsys):
    with pytest.raises(UsageError, match="no launcher says which processes belong to the run"):
        processes.join(Config(coordinator="auto"))


@pytest.mark.parametrize(("variable", "name"), processes.LAUNCHERS.items())
def test_processes_of_a_launcher_that_train_alone_say_so(variable, name, launcher):
    launcher(**{variable: "1"})
    assert processes.not_joined() == []
    launcher(**{variable: "4"})
    [notice] = processes.not_joined()
    assert f"one of 4 processes that {name} started" in notice and "--coordinator=auto" in notice
