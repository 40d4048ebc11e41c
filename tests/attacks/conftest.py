"""Every test here attacks: by bad input, full disks and other processes, or (marker `chaos`) by killing."""

import pytest

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


@pytest.fixture
def root(bucket):
    """A root in an empty bucket."""
    return bucket("runs")
