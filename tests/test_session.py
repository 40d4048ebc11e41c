"""Ray is reached within seconds or refused in one line, never where others reach it; and what fits a cluster."""

import os
import socket
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from raypkg.cluster import session
from raypkg.cluster.session import Plan, plan, trial_size
from raypkg.core.errors import ClusterLost, UserError
from raypkg.core.settings import Cluster

GRPC = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # the empty settings with which an HTTP/2 server begins
HTTP = b"HTTP/1.1 400 Bad Request\r\n\r\n"


@contextmanager
def listening(answer: bytes | None):
    """Listen, and answer each connection; None = never."""
    server = socket.create_server(("127.0.0.1", 0))
    kept = []

    def serve():
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            kept.append(connection)
            if answer is not None:
                connection.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"127.0.0.1:{server.getsockname()[1]}"
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join()
        for connection in kept:
            connection.close()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(session, "ANSWER", 0.2)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_a_head_answers(quick):
    with listening(GRPC) as address:
        session._check_answers(address)


@pytest.mark.parametrize(
    ("answer", "reason"), [(HTTP, "something else listens there"), (b"", "timed out"), (None, "timed out")]
)
def test_what_is_no_head_is_told_from_one(quick, answer, reason):
    with listening(answer) as address, pytest.raises(OSError, match=reason):
        session._check_answers(address)


def test_a_head_with_certificates_is_not_asked(quick, monkeypatch):
    monkeypatch.setenv("RAY_USE_TLS", "1")
    with listening(None) as address:
        session._check_answers(address)


@pytest.mark.parametrize("asked", ["127.0.0.1:1", "nowhere", "no.such.host.invalid:6379", "[::1]:1", "localhost:port"])
@pytest.mark.parametrize("place", ["setting", "environment"])
def test_an_address_at_which_no_cluster_answers_is_refused_in_one_line(quick, monkeypatch, asked, place):
    begin = time.monotonic()
    if place == "environment":
        monkeypatch.setenv("RAY_ADDRESS", asked)
    settings = Cluster(address=asked if place == "setting" else None)
    with pytest.raises(UserError) as refusal:
        session.connect(settings)
    message = str(refusal.value)
    assert f"no Ray cluster answers at cluster.address = {asked!r}" in message
    assert "--cluster.workers 0 trains in this process, without Ray" in message
    assert time.monotonic() - begin < 20


def test_ray_client_is_refused(quick):
    with pytest.raises(UserError, match="'ray://head:10001' is Ray Client's, which cannot train"):
        session.connect(Cluster(address="ray://head:10001"))


def test_a_cluster_that_died_without_ray_stop_is_replaced(quick, monkeypatch, caplog, tmp_path):
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert session._address(Cluster()) is None
    assert "the Ray cluster started at 127.0.0.1:1 no longer answers: starting another" in caplog.text


def test_a_running_cluster_is_not_confined_to_the_loopback_interface(quick, monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setenv(session.LOOPBACK, "1")
    session.prepare("head:6379")
    assert os.environ[session.LOOPBACK] == "1"
    session.prepare()
    assert os.environ[session.LOOPBACK] == "0"


def test_a_ray_that_cannot_start_is_one_line(quick, monkeypatch, tmp_path, capfd):
    (tmp_path / "file").touch()
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"Ray cannot start on this machine: .*; --cluster.workers 0 trains in this"):
        session.connect(Cluster(address="local"))
    assert capfd.readouterr().err == ""


def test_a_dead_raylet_is_one_line():
    from ray.exceptions import LocalRayletDiedError

    with pytest.raises(ClusterLost, match="its raylet on this machine died"), session.cluster_errors():
        raise LocalRayletDiedError
    with pytest.raises(RuntimeError, match="a mistake"), session.cluster_errors():
        raise RuntimeError("a mistake")


def test_only_its_own_cluster_is_shut_down_even_if_another_took_its_place(quick, monkeypatch):
    import ray

    shut = []
    node = "its own"
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: None)
    monkeypatch.setattr(ray, "shutdown", lambda: shut.append(node))
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: node))
    monkeypatch.setattr(session, "_own_node", "")
    session.connect(Cluster(address="local"))
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    session.disconnect()
    node = "the caller's"
    session.disconnect()
    assert shut == ["its own"]


@pytest.mark.parametrize(("mode", "warned"), [("token", False), ("Token", False), ("disabled", True), (None, True)])
def test_a_cluster_without_a_token_is_reported(quick, monkeypatch, caplog, mode, warned):
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: None)
    monkeypatch.setattr(session, "_own_node", "")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "node"))
    if mode is None:
        monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    else:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    session.connect(Cluster(address="local"))
    assert ("this Ray cluster requires no token" in caplog.text) == warned


# Capacity, from descriptions of nodes

HEAD = {"CPU": 8.0}
BIG = {"CPU": 96.0, "GPU": 8.0}
SMALL = {"CPU": 16.0, "GPU": 4.0}


@pytest.fixture
def cluster(monkeypatch):
    """Describe the nodes of the cluster."""

    def describe(*nodes):
        monkeypatch.setattr(session, "_nodes", lambda: list(nodes))

    return describe


@pytest.mark.parametrize(
    ("nodes", "settings", "size"),
    [
        ([HEAD], {}, Plan(8, 1, 0)),  # without GPUs a worker has one CPU
        ([HEAD], {"cpus_per_worker": 4}, Plan(2, 4, 0)),
        ([BIG], {}, Plan(8, 12, 1)),
        ([BIG], {"workers": 1}, Plan(1, 12, 1)),  # the other GPUs' CPUs are left to other runs
        ([BIG], {"gpus_per_worker": 0.5, "workers": 16}, Plan(16, 6, 0.5)),
        ([BIG], {"gpus_per_worker": 2}, Plan(4, 24, 2)),
        ([BIG], {"gpus_per_worker": 0}, Plan(8, 1, 0)),
        ([BIG], {"cpus_per_worker": 2}, Plan(8, 2, 1)),
        ([HEAD, SMALL, SMALL], {}, Plan(8, 4, 1)),  # a node without GPUs has no say
        ([BIG, SMALL], {"workers": 12}, Plan(12, 4, 1)),  # workers are alike: the poorer node decides
        ([{"CPU": 2.0, "GPU": 4.0}], {}, Plan(2, 1, 1)),  # fewer CPUs than GPUs
        ([{"CPU": 9.0, "GPU": 2.0}], {}, Plan(2, 4, 1)),
    ],
)
def test_the_size_of_workers(cluster, nodes, settings, size):
    cluster(*nodes)
    assert plan(Cluster(**settings)) == size


def test_no_more_workers_than_there_is_work_for(cluster):
    cluster(BIG)
    assert plan(Cluster(), most=3) == Plan(3, 12, 1)


def test_trials_divide_a_node_by_its_gpus(cluster):
    cluster(SMALL)
    size = trial_size(Cluster(), None)
    assert size == Plan(1, 4, 1, at_once=4)
    # What a trial plans for itself, from the settings that it is given, is what it was given room for.
    assert plan(Cluster(workers=size.of_a_trial)) == Plan(1, 4, 1)


def test_a_trial_in_one_process_has_no_gpu_and_one_cpu(cluster):
    cluster(SMALL)
    size = trial_size(Cluster(workers=0), None)
    assert size == Plan(1, 1, 0, at_once=16) and size.of_a_trial == 0


def test_what_does_not_fit_is_refused(cluster):
    cluster(SMALL)
    with pytest.raises(UserError, match=r"5 workers of 4 CPU and 1 GPU do not fit the cluster, .* room for 4"):
        plan(Cluster(workers=5))
    with pytest.raises(UserError, match="17 workers of 1 CPU and 0 GPU do not fit"):
        plan(Cluster(workers=17, gpus_per_worker=0))
