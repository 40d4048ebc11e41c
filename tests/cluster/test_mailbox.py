"""What workers send to the driver: all of it arrives, or the run says that it did not."""

import pytest

from raypkg.cluster.mailbox import first_error, open_mailbox
from raypkg.core.errors import Interruption


def test_rows_and_errors_arrive(ray):
    rows = []
    with open_mailbox(rows.append) as mailbox:
        mailbox.put.remote({"epoch": 1})
        mailbox.fail.remote("first")
        mailbox.fail.remote("second")
        assert first_error(mailbox) == "first"
    assert rows == [{"epoch": 1}]


def test_a_mailbox_that_died_interrupts_the_run(ray):
    from ray.exceptions import RayActorError

    with open_mailbox(lambda row: None) as mailbox:
        assert first_error(mailbox) is None
        ray.kill(mailbox)
        with pytest.raises(RayActorError):  # the order to die may take its time
            while True:
                ray.get(mailbox.error.remote())
        with pytest.raises(Interruption, match="the process that passes metrics on from the workers was lost"):
            first_error(mailbox)
