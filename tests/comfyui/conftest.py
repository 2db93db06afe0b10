"""Fixtures of the end-to-end checks: servers and pages that are started once, and the table at the end.

Without a ComfyUI checkout nothing is collected here, and the last line of the run says so.
"""

from __future__ import annotations

import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from ming_univision.tests.comfyui.browser import Page
from ming_univision.tests.comfyui.finding import (
    NO_BROWSER,
    NO_CHECKOUT,
    NotFound,
    find_browser,
    find_checkout,
    find_python,
)
from ming_univision.tests.comfyui.server import API_WORKFLOWS, Server, ServerError, read_workflow

NODES_2 = "Comfy.VueNodes.Enabled"
HERE = Path(__file__).resolve().parent
USED = pytest.StashKey[list]()  # what the checks ran on, for the table's head
DOWN = pytest.StashKey[bool]()  # whether a server did not start


def checkout_of(config: pytest.Config) -> Path | None:
    try:
        return find_checkout(config.getoption("comfyui"))
    except NotFound as error:
        raise pytest.UsageError(str(error)) from None


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    return None if checkout_of(config) else True


def pytest_configure(config: pytest.Config) -> None:
    config.stash[USED] = []


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.config.stash.get(DOWN, False):
        pytest.skip("the server does not start")


@pytest.fixture(scope="session", autouse=True)
def ended_politely() -> Iterator[None]:
    """SIGTERM stops servers and browsers as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.exit("terminated", returncode=143))
    yield
    signal.signal(signal.SIGTERM, before)


@contextmanager
def folder(config: pytest.Config, name: str) -> Iterator[Path]:
    """A temporary folder, removed afterwards unless --comfyui-keep is given."""
    path = Path(tempfile.mkdtemp(prefix=f"ming-{name}-"))
    try:
        yield path
    finally:
        if config.getoption("comfyui_keep"):
            config.stash[USED].append(f"kept: {path}")
        else:
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def started(config: pytest.Config, *flags: str) -> Iterator[Server]:
    checkout = checkout_of(config)
    python = find_python(checkout, config.getoption("comfyui_python"))
    with folder(config, "comfyui") as base, ExitStack() as stack:
        try:
            server = stack.enter_context(Server(checkout, python, base, *flags))
        except (NotFound, ServerError) as error:
            config.stash[DOWN] = True
            raise pytest.fail.Exception(str(error), pytrace=False) from None
        yield server


@pytest.fixture(scope="session")
def server(pytestconfig: pytest.Config) -> Iterator[Server]:
    """ComfyUI with live previews."""
    with started(pytestconfig, "--preview-method", "auto") as server:
        pytestconfig.stash[USED].append(f"ComfyUI {server.version} in {server.checkout}, run by {server.python}")
        yield server


@pytest.fixture(scope="session")
def server_without_previews(pytestconfig: pytest.Config) -> Iterator[Server]:
    with started(pytestconfig, "--preview-method", "none") as server:
        yield server


@pytest.fixture(scope="session")
def page(pytestconfig: pytest.Config, server: Server) -> Iterator[Page]:
    """ComfyUI's page, fully loaded, with no dialog over the graph."""
    browser = find_browser(pytestconfig.getoption("comfyui_browser"))
    if browser is None:
        pytest.skip(NO_BROWSER)
    server.post("/settings", {"Comfy.TutorialCompleted": True})  # or the first visit starts with a dialog
    with folder(pytestconfig, "browser") as profile, Page(browser, profile) as page:
        page.open(server.url)
        page.wait_for("window.app?.graph && window.app.extensionManager && document.querySelector('canvas')")
        page.evaluate("await app.loadGraphData({version: 0.4, nodes: [], links: []})")
        page.wait_until_quiet()
        pytestconfig.stash[USED].append(f"{page.version} from {browser}")
        yield page


@pytest.fixture(params=["classic", "Nodes 2.0"])
def rendering(request, page):
    modern = request.param == "Nodes 2.0"
    kind = page.evaluate("return app.ui.settings.settingsLookup[key]?.type", key=NODES_2)
    if kind != "boolean":  # absent or hidden: not yet available to users
        if modern:
            pytest.skip("this ComfyUI has no Nodes 2.0 rendering")
        return request.param
    page.evaluate("await app.extensionManager.setting.set(key, modern)", key=NODES_2, modern=modern)
    return request.param


@pytest.fixture(params=API_WORKFLOWS)
def name(request: pytest.FixtureRequest) -> str:
    """The name of each shipped workflow."""
    return request.param


@pytest.fixture
def workflow():
    """workflow(name, {"3.seed": 5}) reads a shipped workflow in the API format and changes inputs."""
    return read_workflow


# --- The table ----------------------------------------------------------------------------------------------------


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    reports = [r for group in terminalreporter.stats.values() for r in group if isinstance(r, pytest.TestReport)]
    checks: dict[str, list[pytest.TestReport]] = {}
    for report in reports:
        if HERE in (config.rootpath / report.nodeid.split("::")[0]).parents:
            checks.setdefault(report.nodeid, []).append(report)
    if checks:
        terminalreporter.section("Checked in a real ComfyUI")
        for line in config.stash[USED]:
            terminalreporter.write_line(line)
        terminalreporter.write_line(f"\n{'result':9}{'seconds':>8}  check")
        for nodeid, phases in checks.items():
            terminalreporter.write_line(table_line(nodeid, phases))
    elif not checkout_of(config):
        terminalreporter.write_line(f"Left out: the end-to-end checks in ComfyUI; {NO_CHECKOUT}")


def table_line(nodeid: str, phases: list[pytest.TestReport]) -> str:
    """One line of the table. The phases are setup, call and teardown, as far as the check got."""
    check = nodeid.split("::")[-1].removeprefix("test_").replace("_", " ").replace("[", ": ").rstrip("]")
    seconds = sum(phase.duration for phase in phases)
    if any(phase.failed for phase in phases):
        result = "FAILED"
    elif skipped := [phase for phase in phases if phase.skipped]:
        result, check = "left out", f"{check}: {skipped[0].longrepr[2].removeprefix('Skipped: ')}"
    else:
        result = "passed"
    return f"{result:9}{seconds:8.1f}  {check}"
