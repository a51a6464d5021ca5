"""The console in a real browser: what it shows, what its buttons do, and what other clients see of it."""

from __future__ import annotations

import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.http as httpclient
from playwright.sync_api import Page, expect, sync_playwright

from enginehouse.testing.server import ServerProcess

EXAMPLES = Path(__file__).resolve().parents[2] / "model_repository"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (Debian's package chromium)")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    for name in ("identity", "add_sub"):
        (folder / name).symlink_to(EXAMPLES / name)
    broken = folder / "broken" / "1"
    broken.mkdir(parents=True)
    (broken / "model.py").write_text("raise RuntimeError('no <b>luck</b>')\n")
    (folder / "broken" / "config.pbtxt").write_text('backend: "python"\n')
    return folder


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[ServerProcess]:
    flags = ["--model-control-mode=explicit", "--load-model=*", "--exit-on-error=false", "--strict-readiness=false"]
    with ServerProcess([repository], flags) as server:
        yield server


@pytest.fixture
def page() -> Iterator[Page]:
    """A page that must not log an error: no refused script, no failed expression."""
    assert CHROMIUM is not None
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        yield page
        page.close()
        browser.close()
        assert [each for each in problems if "the server responded with a status" not in each] == []


def infer(server: ServerProcess, times: int) -> None:
    values = np.zeros((2, 4), np.float32)
    tensor = httpclient.InferInput("INPUT0", [2, 4], "FP32").set_data_from_numpy(values)
    with httpclient.InferenceServerClient(server.http) as client:
        for _ in range(times):
            client.infer("identity", [tensor])


@needs_browser
def test_it_shows_models_their_state_and_their_load(server: ServerProcess, page: Page) -> None:
    page.goto(f"http://{server.http}/")
    identity = page.locator("tr[data-model=identity]")
    expect(identity).to_contain_text("READY")
    broken = page.locator("tr[data-model=broken]")
    expect(broken).to_contain_text("UNAVAILABLE")
    expect(broken.locator(".reason")).to_contain_text("no <b>luck</b>")
    expect(page.locator("#cpu")).to_contain_text("CPU")
    before = float(identity.locator("td").nth(3).inner_text().replace("–", "0"))
    assert before == 0
    page.wait_for_function(
        "() => !document.querySelector('tr[data-model=identity] td:nth-child(4)').textContent.includes('–')"
    )
    infer(server, 300)
    page.wait_for_function(
        "() => parseFloat(document.querySelector('tr[data-model=identity] td:nth-child(4)').textContent) > 1"
    )
    assert identity.locator("td").nth(8).inner_text() == "2.0"
    assert identity.locator("td").nth(5).inner_text().endswith(("µs", "ms"))


@needs_browser
def test_a_model_can_be_tried(server: ServerProcess, page: Page) -> None:
    page.goto(f"http://{server.http}/console")
    page.locator("tr[data-model=identity]").get_by_role("button", name="Try").click()
    expect(page.locator("#try-request")).to_have_value(
        '{"inputs": [\n  {"name":"INPUT0","datatype":"FP32","shape":[1,1],"data":[1]}\n]}'
    )
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#try-result")).to_contain_text("200 in")
    expect(page.locator("#try-answer")).to_contain_text('"outputs":[{"name":"OUTPUT0"')
    page.locator("#try-request").fill("{")
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#try-answer")).to_contain_text("failed to parse the request JSON buffer")


@needs_browser
def test_buttons_load_and_unload(server: ServerProcess, page: Page) -> None:
    page.goto(f"http://{server.http}/")
    row = page.locator("tr[data-model=add_sub]")
    row.get_by_role("button", name="Unload").click()
    expect(row).to_contain_text("UNAVAILABLE", timeout=15_000)
    row.get_by_role("button", name="Load").click()
    expect(row).to_contain_text("READY", timeout=15_000)


@needs_browser
def test_a_restricted_server_asks_for_its_header(repository: Path, page: Page) -> None:
    with ServerProcess(
        [repository],
        ["--exit-on-error=false", "--strict-readiness=false", "--http-restricted-api=statistics:admin=letmein"],
    ) as server:
        page.goto(f"http://{server.http}/")
        expect(page.locator("#connection")).to_contain_text("expecting header 'admin'")
        page.locator("#header").fill("admin: letmein")
        page.locator("#header").press("Tab")
        expect(page.locator("tr[data-model=identity]")).to_contain_text("READY", timeout=10_000)


def status_of(url: str, accept: str = "*/*") -> int:
    request = urllib.request.Request(url, headers={"Accept": accept})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_clients_that_are_no_browsers_find_nothing_at_the_root(server: ServerProcess) -> None:
    assert status_of(f"http://{server.http}/") == 404
    assert status_of(f"http://{server.http}/", "text/html,application/xhtml+xml") == 200


def test_it_can_be_switched_off(repository: Path) -> None:
    flags = ["--allow-console=false", "--exit-on-error=false", "--strict-readiness=false"]
    with ServerProcess([repository], flags) as server:
        assert status_of(f"http://{server.http}/", "text/html") == 404
        assert status_of(f"http://{server.http}/console") == 404


def test_only_the_pages_own_script_may_run(server: ServerProcess) -> None:
    with urllib.request.urlopen(f"http://{server.http}/console") as answer:
        policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'sha256-" in policy
    assert "unsafe-inline" not in policy
