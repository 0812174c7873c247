"""A page in headless Chromium, without a network, in a window of any width."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")

# Chromium's own windows are at least 500 pixels wide; a frame is not. Its page is read when it and its scripts are through.
FRAME = """<!doctype html><body style="margin: 0"><iframe src="{uri}" style="width: {width}px; height: 900px; border: 0"></iframe>
<pre></pre><script>
window.onload = () => {{
  const frame = document.querySelector("iframe"), page = frame.contentDocument.documentElement;
  const loaded = frame.contentWindow.performance.getEntriesByType("resource").map(entry => entry.name);
  document.querySelector("pre").textContent = JSON.stringify({{wide: page.scrollWidth, loaded, html: page.outerHTML}});
}};
</script>"""


def open_page(page: Path, width: int, folder: Path) -> str:
    """The HTML of a page, after its scripts; it may log nothing, ask nothing of the network, and not be wider than its window.

    Args:
        page: an HTML file.
        width: of the window, in CSS pixels.
        folder: for the browser's own files.
    """
    assert CHROMIUM is not None
    frame = folder / f"frame-{width}.html"
    frame.write_text(FRAME.format(uri=page.resolve().as_uri(), width=width))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--allow-file-access-from-files",
               "--window-size=1600,1000", "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder / 'profile'}",
               "--dump-dom", frame.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert "CONSOLE" not in done.stderr, done.stderr
    shown = re.search(r"<pre>(.*?)</pre>", done.stdout, re.S)
    assert shown is not None, done.stdout + done.stderr
    found = json.loads(html.unescape(shown[1]))
    asked = [url for url in found["loaded"] if not url.startswith(("file:", "data:", "blob:"))]
    assert not asked, f"{page.name} asks for {asked}"
    assert found["wide"] <= width, f"{page.name} is {found['wide']} pixels wide in a window of {width}"
    return str(found["html"])
