"""Processes of a run meet, or each says within seconds why not."""

import socket
import threading
import time

import pytest

from train.run import hosts, meeting
from train.run.meeting import Place, meet, tell


@pytest.fixture
def at() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def outcomes(*calls) -> list[str | None]:
    """The error of each call, made in threads at the same time."""
    found: list[str | None] = [None] * len(calls)

    def call(number):
        function, *args = calls[number]
        try:
            function(*args)
        except OSError as error:
            found[number] = str(error)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_processes_meet_in_any_order_and_leave_the_port_free(at):
    host, port = at.split(":")
    for _ in range(2):
        order = (2, 0, 1)
        assert outcomes(*[(meet, Place(at, 3, i), 20) for i in order]) == [None] * 3
    socket.create_server((host, int(port))).close()


@pytest.mark.parametrize(
    ("places", "said"),
    [
        (((2, 0), (3, 1)), "process 1 has --processes 3, process 0 2: give all the same number"),
        (((3, 0), (3, 1), (3, 1)), "two processes have --process 1: give each a number of its own"),
        (((2, 0), (2, 0)), "two processes have --process 0: give each a number of its own"),
    ],
)
def test_each_process_says_what_contradicts(at, places, said):
    found = outcomes(*[(meet, Place(at, *place), 5) for place in places])
    # Of two listeners one may have failed before the other could answer.
    assert said in found
    assert None not in found


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_process_that_stops_before_the_meeting_tells_the_others(at, stopped):
    calls = [(tell if i == stopped else meet, Place(at, 2, i), 20) for i in range(2)]
    calls[stopped] = calls[stopped][:2]
    found = outcomes(*calls)
    assert found[1 - stopped] == f"process {stopped} of the run has stopped: it says why"


def test_one_that_ends_while_it_waits_ends_the_others(at):
    def leave():
        while True:
            try:
                with socket.create_connection(Place(at, 3, 1).address) as connection:
                    connection.sendall(b'{"process": 1, "processes": 3, "stopped": false}')
                    return
            except ConnectionRefusedError:
                time.sleep(0.05)

    found = outcomes((meet, Place(at, 3, 0), 20), (leave,))
    assert found[0] == "process 1 of the run has stopped: it says why"


def test_who_did_not_come_is_named_and_other_programs_are_not_heard(at, capsys, monkeypatch):
    monkeypatch.setattr(meeting, "HINT_SECONDS", 0)

    def stray():
        time.sleep(0.3)
        with socket.create_connection(Place(at, 4, 1).address) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with socket.create_connection(Place(at, 4, 1).address) as connection:
            connection.sendall(b"[" * 4000)  # JSON too deep to read

    found = outcomes((meet, Place(at, 4, 0), 3), (meet, Place(at, 4, 2), 9), (stray,))
    said = f"the processes of the run do not meet at {at}: processes 1, 3 did not come"
    assert found[:2] == [said] * 2
    assert f"still waiting for processes 1, 2, 3 of the run at {at}" in capsys.readouterr().err
    found = outcomes((meet, Place(at, 2, 1), 0.5))
    assert found == [f"{said.split(': ')[0]}: process 0 does not answer (Connection refused)"]
    assert f"process 0 does not answer at {at} yet (Connection ref" in capsys.readouterr().err


def test_an_address_of_another_host_is_named():
    found = outcomes((meet, Place("192.0.2.1:29500", 2, 0), 1))
    assert found == [
        "--coordinator 192.0.2.1:29500: process 0 cannot listen there (Cannot assign requested "
        "address); give an address of its host and a free port"
    ]


def test_a_command_that_is_wrong_otherwise_says_where_its_process_is(monkeypatch):
    given = ["--rnak", "3", "--coordinator=h:1", "--processes", "2", "--process", "1", "--model"]
    assert hosts.place_of(given) == Place("h:1", 2, 1)
    for wrong in ([], ["--process", "x"], ["--coordinator", "h"], ["--launcher"]):
        assert hosts.place_of(given[:-3] + wrong) is None
    known = {"MASTER_ADDR": "h", "MASTER_PORT": "2", "WORLD_SIZE": "8", "RANK": "3"}
    for name, value in known.items():
        monkeypatch.setenv(name, value)
    assert hosts.place_of(["--launcher"]) == Place("h:2", 8, 3)
