"""What passes between driver and workers: all of it arrives, or the run says that it did not."""

from queue import SimpleQueue

import pytest

from raypkg.cluster.mailbox import LOST, open_mailbox, start_delivery
from raypkg.core.errors import Interruption, UserError


@pytest.fixture
def mailbox(ray):
    return open_mailbox()


def deliver(mailbox, report):
    outcomes = SimpleQueue()
    return start_delivery(mailbox, report, outcomes), outcomes


def test_rows_arrive_before_the_answer_and_errors_end_it(ray, mailbox):
    rows = []
    delivery, outcomes = deliver(mailbox, rows.append)
    ray.get(mailbox.put.remote({"epoch": 1}))
    mailbox.answer.remote({"loss": 0.5})
    assert outcomes.get(timeout=60) == {"loss": 0.5}
    assert rows == [{"epoch": 1}]
    mailbox.fail.remote("this is wrong")
    error = outcomes.get(timeout=60)
    assert isinstance(error, UserError) and str(error) == "this is wrong"
    delivery.join()


def test_a_restarted_worker_goes_on_with_the_task_without_an_answer(ray, mailbox):
    for name in ("first", "second"):
        ray.get(mailbox.assign.remote([ray.put(name)]))
    assert ray.get(mailbox.next.remote()) == 0
    ray.get(mailbox.answer.remote(None))
    number = ray.get(mailbox.next.remote())
    (task,) = ray.get(mailbox.task.remote(number))
    assert ray.get(task) == "second"
    waiting = mailbox.task.remote(2)
    assert not ray.wait([waiting], timeout=0.2)[0]
    mailbox.end.remote()
    assert ray.get(waiting) is None


def test_a_mailbox_that_died_interrupts_the_run(ray, mailbox):
    _, outcomes = deliver(mailbox, print)
    ray.kill(mailbox)
    error = outcomes.get(timeout=60)
    assert isinstance(error, Interruption) and str(error) == LOST


def test_what_keeping_a_row_raises_reaches_the_driver(mailbox):
    def full(row):
        raise OSError("no space left on device")

    _, outcomes = deliver(mailbox, full)
    mailbox.put.remote({"epoch": 1})
    assert isinstance(outcomes.get(timeout=60), OSError)
