"""Every test here attacks: by bad input, full disks and other processes, or (marker `chaos`) by killing."""

import logging
import urllib.request

import pytest

from bucket import BUCKET, query

HERE = "tests/attacks/"


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in str(item.path) and not item.get_closest_marker("chaos"):
            item.add_marker(pytest.mark.attack)


def pytest_terminal_summary(terminalreporter):
    survived, fallen = (
        sum(
            report.when == "call" and report.nodeid.startswith(HERE)
            for report in terminalreporter.stats.get(outcome, ())
        )
        for outcome in ("passed", "failed")
    )
    if survived or fallen:
        terminalreporter.write_line(f"attacks: {survived + fallen} tried, {survived} survived")
    kills = sum(
        value
        for reports in terminalreporter.stats.values()
        for report in reports
        for name, value in getattr(report, "user_properties", ())
        if name == "killed" and report.when == "call"
    )
    if kills:
        terminalreporter.write_line(f"kills: {kills}")


@pytest.fixture(scope="module")
def port():
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it names every request
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "KEY")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "SECRET")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
        server.start()
        _, port = server.get_host_and_port()
        yield port
        server.stop()


@pytest.fixture
def root(port):
    """An empty bucket, and a root in it."""
    server = f"http://127.0.0.1:{port}"
    for method, address in (("POST", f"{server}/moto-api/reset"), ("PUT", f"{server}/{BUCKET}")):
        urllib.request.urlopen(urllib.request.Request(address, method=method)).close()
    return f"s3://{BUCKET}/runs?{query(port)}"
