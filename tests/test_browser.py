"""The site in a browser: every page at the width of a phone, the search, and the live examples."""

import json
import shutil
import subprocess
import tempfile
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

websocket = pytest.importorskip("websocket", reason="websocket-client is not installed: pip install -e '.[dev]'")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SEARCHES = {
    "SISE": "papers/01_sise.html",
    "EDDA": "papers/04_edda.html",
    "troubleshooting": "guide/troubleshooting.html",
}
PHONE = 390  # CSS pixels
TOO_WIDE = f"document.documentElement.scrollWidth > {PHONE} ? 'scrolls sideways' : ''"
BAD_PICTURES = """[...document.images].filter(i => i.checkVisibility())
    .filter(i => !i.naturalWidth || i.src.endsWith(i.alt.split('/').at(-1)) && !i.matches('.logo__image'))
    .map(i => 'picture ' + i.src.slice(-60))"""  # not loaded, or without a text of its own: none, or the file's name

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not CHROMIUM, reason="no browser: none of chromium, chromium-browser, google-chrome is installed"
    ),
]


class Tab:
    "A tab of headless Chromium, driven by the DevTools protocol"

    def __init__(self, socket):
        self.socket, self.calls, self.events, self.session = socket, 0, [], {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=PHONE, height=844, deviceScaleFactor=1, mobile=False)

    def receive(self):
        self.events.append(json.loads(self.socket.recv()))
        return self.events[-1]

    def call(self, method, **params):
        self.calls += 1
        self.socket.send(json.dumps({"id": self.calls, "method": method, "params": params, **self.session}))
        while (answer := self.receive()).get("id") != self.calls:
            pass
        assert "error" not in answer, f"{method}: {answer}"
        return answer["result"]

    def look(self, expression):
        "The value of a JavaScript expression, once it is there"
        got = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in got, f"{expression}: {got}"
        return got["result"].get("value")

    def open(self, url):
        "Load a page, and wait for its pictures and formulas"
        self.events.clear()
        self.call("Page.navigate", url=url)
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.receive()
        self.look("window.MathJax?.startup?.promise.then(() => 0)")

    def wait(self, expression, seconds=20):
        "Does the expression become true in time"
        end = time.monotonic() + seconds
        while not (value := self.look(f"Boolean({expression})")) and time.monotonic() < end:
            time.sleep(0.05)
        return value

    def faults(self):
        "Errors since the page was opened: exceptions, the console, files that did not load"
        for event in self.events:
            params = event.get("params", {})
            levels = {
                "Runtime.exceptionThrown": "error",
                "Runtime.consoleAPICalled": params.get("type"),
                "Log.entryAdded": params.get("entry", {}).get("level"),
            }
            if levels.get(event.get("method")) == "error":
                yield json.dumps(params)[:300]


@pytest.fixture(scope="module")
def tab():
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ["--headless", "--no-sandbox", "--remote-debugging-port=0", f"--user-data-dir={profile}"]
        chromium = subprocess.Popen([CHROMIUM, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            address, end = Path(profile) / "DevToolsActivePort", time.monotonic() + 60
            while not (address.is_file() and len(address.read_text().split()) == 2):
                assert chromium.poll() is None and time.monotonic() < end, "Chromium does not start"
                time.sleep(0.05)
            port, path = address.read_text().split()
            yield Tab(websocket.create_connection(f"ws://127.0.0.1:{port}{path}", timeout=60, suppress_origin=True))
        finally:
            chromium.terminate()
            chromium.wait(30)


@pytest.fixture(scope="module")
def address(site):
    "The site over HTTP, at a free port"

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_every_page(tab, address, site):
    names = sorted(file.relative_to(site).as_posix() for file in site.rglob("*.html"))
    names = [name for name in names if not name.startswith("_static/")]
    assert len(names) > 100
    found = []
    for name in names:
        tab.open(f"{address}/{name}")
        faults = [*tab.look(BAD_PICTURES), tab.look(TOO_WIDE), *tab.faults()]
        found += [f"{name}: {fault}" for fault in faults if fault]
    assert found == []


@pytest.mark.parametrize("words, page", SEARCHES.items())
def test_search(tab, address, words, page):
    tab.open(f"{address}/search.html?q={words}")
    first = "document.querySelector('#search-results li a')?.getAttribute('href')"
    assert tab.wait(f"{first} === '{page}'"), tab.look(first)
    assert list(tab.faults()) == []


def test_gallery(tab, address):
    "The second map of the second photograph, beside a third"
    tab.open(f"{address}/examples/gallery.html")
    tab.look("by('next').click(), document.querySelectorAll('[name=method]')[1].click()")
    tab.look("by('second').value = 2, by('second').onchange({target: by('second')})")
    maps = tab.look("[...document.querySelectorAll('.heat')].filter(map => map.checkVisibility()).map(map => map.alt)")
    assert maps == ["LayerCAM map of coffee", "Integrated Grad-CAM map of coffee"]
    assert tab.wait("[...document.querySelectorAll('.heat')].every(map => map.naturalWidth)")
    assert [tab.look(TOO_WIDE), *tab.look(BAD_PICTURES), *tab.faults()] == [""]


def test_audit(tab, address):
    "A click on a heading sorts the table of the classes, a second one turns it round"
    tab.open(f"{address}/examples/audit.html")
    names = "[...document.querySelector('table.sort').tBodies[0].rows].map(row => row.cells[0].textContent)"
    orders = [tab.look(f"document.querySelector('table.sort button').click(), {names}") for _ in range(2)]
    assert len(orders[0]) == 20 and orders == [sorted(orders[0]), sorted(orders[0], reverse=True)]
    numbers = "[...document.querySelector('table.sort').tBodies[0].rows].map(row => Number(row.cells[4].dataset.value))"
    values = tab.look(f"document.querySelectorAll('table.sort button')[4].click(), {numbers}")
    assert len(set(values)) == 20 and values == sorted(values), "confidences of 0.857 and 0.9 are numbers, not runs of digits"
    assert list(tab.faults()) == []
