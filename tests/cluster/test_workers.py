"""Driver and workers: what passes between them arrives, or the run says that it did not; workers start, or it ends."""

import threading
from queue import SimpleQueue

import pytest

from raypkg.cluster import workers
from raypkg.cluster.workers import LOST, deliver, open_mailbox
from raypkg.core.errors import Interruption, UserError
from raypkg.core.settings import Cluster


@pytest.fixture
def mailbox(ray):
    return open_mailbox()


def delivered(mailbox, report):
    outcomes = SimpleQueue()
    thread = threading.Thread(target=deliver, args=(mailbox, report, outcomes), daemon=True)
    thread.start()
    return thread, outcomes


def test_rows_arrive_before_the_answer_and_errors_end_it(ray, mailbox):
    rows = []
    delivery, outcomes = delivered(mailbox, rows.append)
    ray.get(mailbox.put.remote("row", {"epoch": 1}))
    mailbox.put.remote("answer", {"loss": 0.5})
    assert outcomes.get(timeout=60) == {"loss": 0.5}
    assert rows == [{"epoch": 1}]
    mailbox.put.remote("error", "this is wrong")
    error = outcomes.get(timeout=60)
    assert isinstance(error, UserError) and str(error) == "this is wrong"
    delivery.join()


def test_a_restarted_worker_goes_on_with_the_task_without_an_answer(ray, mailbox):
    for name in ("first", "second"):
        ray.get(mailbox.assign.remote([ray.put(name)]))
    assert ray.get(mailbox.next.remote()) == 0
    ray.get(mailbox.put.remote("answer", None))
    number = ray.get(mailbox.next.remote())
    (task,) = ray.get(mailbox.task.remote(number))
    assert ray.get(task) == "second"
    waiting = mailbox.task.remote(2)
    assert not ray.wait([waiting], timeout=0.2)[0]
    mailbox.end.remote()
    assert ray.get(waiting) is None


def test_a_mailbox_that_died_and_what_keeping_a_row_raises_reach_the_driver(ray, mailbox):
    def full(row):
        raise OSError("no space left on device")

    _, outcomes = delivered(mailbox, full)
    mailbox.put.remote("row", {"epoch": 1})
    assert isinstance(outcomes.get(timeout=60), OSError)
    _, outcomes = delivered(mailbox, print)
    ray.kill(mailbox)
    error = outcomes.get(timeout=60)
    assert isinstance(error, Interruption) and str(error) == LOST


def test_workers_that_cannot_start_interrupt_the_run(ray, monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "1")
    monkeypatch.setattr(workers, "owns_cluster", lambda: True)
    cpus = int(ray.cluster_resources()["CPU"])
    leaked = ray.util.placement_group([{"CPU": 1}] * cpus)  # as Ray Train leaves one behind
    ray.get(leaked.ready())
    try:
        with pytest.raises(Interruption, match=r"the workers cannot be started: .*timed out"):
            workers.Workers(Cluster(workers=1), print, str(tmp_path)).run(int)
    finally:
        ray.util.remove_placement_group(leaked)
