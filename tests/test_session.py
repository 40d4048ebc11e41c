"""Ray is reached within seconds or refused in one line, never where others reach it; and what fits a cluster."""

import os
import re
import socket
import threading
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
    """Listen, and answer the first connection; None = never."""
    kept = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            connection, _ = server.accept()
            kept.append(connection)
            connection.sendall(answer or b"")

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        thread.join()
        kept.pop().close()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(session, "ANSWER", 0.2)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_a_head_is_told_from_what_is_none_and_one_with_certificates_is_not_asked(quick, monkeypatch):
    with listening(GRPC) as address:
        session._check_answers(address)
    for answer, reason in ((HTTP, "something else listens there"), (None, "timed out")):
        with listening(answer) as address, pytest.raises(OSError, match=reason):
            session._check_answers(address)
    monkeypatch.setenv("RAY_USE_TLS", "1")
    with listening(None) as address:
        session._check_answers(address)


@pytest.mark.parametrize("asked", ["127.0.0.1:1", "nowhere", "no.such.host.invalid:6379", "[::1]:1", "ray://head:1"])
@pytest.mark.parametrize("place", ["setting", "environment"])
def test_an_address_at_which_no_cluster_answers_is_refused_in_one_line(quick, monkeypatch, asked, place):
    if place == "environment":
        monkeypatch.setenv("RAY_ADDRESS", asked)
    message = rf"no Ray cluster answers at cluster.address = {re.escape(repr(asked))} .*; --cluster.workers 0 trains in"
    if asked.startswith("ray:"):
        message = f"{asked!r} is Ray Client's, which cannot train"
    with pytest.raises(UserError, match=message):
        session.connect(Cluster(address=asked if place == "setting" else None))


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


@pytest.fixture
def pretended(quick, monkeypatch):
    """Connect to a cluster that is pretended; return Ray, the node that this process is on, and what is shut down."""
    import ray

    node, shut = ["its own"], []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: None)
    monkeypatch.setattr(ray, "shutdown", lambda: shut.append(node[0]))
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: node[0]))
    monkeypatch.setattr(session, "_own_node", "")
    return ray, node, shut


def test_only_its_own_cluster_is_shut_down_even_if_another_took_its_place(pretended, monkeypatch):
    ray, node, shut = pretended
    session.connect(Cluster(address="local"))
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    session.disconnect()
    node[0] = "the caller's"
    session.disconnect()
    assert shut == ["its own"]


@pytest.mark.parametrize(("mode", "warned"), [("Token", False), ("disabled", True), ("", True)])
def test_a_cluster_without_a_token_is_reported(pretended, monkeypatch, caplog, mode, warned):
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
    assert plan(Cluster(**settings), most=1).workers == settings.get("workers", 1)  # no more than there is work for


def test_trials_divide_a_node_by_its_gpus_and_one_in_one_process_has_none(cluster):
    cluster(SMALL)
    size = trial_size(Cluster(), None)
    assert size == Plan(1, 4, 1, at_once=4)
    # What a trial plans for itself, from the settings that it is given, is what it was given room for.
    assert plan(Cluster(workers=size.of_a_trial)) == Plan(1, 4, 1)
    size = trial_size(Cluster(workers=0), None)
    assert size == Plan(1, 1, 0, at_once=16) and size.of_a_trial == 0


def test_what_does_not_fit_is_refused(cluster):
    cluster(SMALL)
    with pytest.raises(UserError, match=r"5 workers of 4 CPU and 1 GPU do not fit the cluster, .* room for 4"):
        plan(Cluster(workers=5))
    with pytest.raises(UserError, match="17 workers of 1 CPU and 0 GPU do not fit"):
        plan(Cluster(workers=17, gpus_per_worker=0))
