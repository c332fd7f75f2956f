"""The report in a real browser, from file://, as wide as a phone. Skipped where there is no Chromium."""

import json
import shutil
import subprocess

import pytest
from test_cpu_commands import healthy

from minigrpo.report import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
)  # fmt: skip
MEASURE = """<script>
document.title = JSON.stringify({width: document.documentElement.scrollWidth, window: innerWidth,
  loaded: [...document.images].filter(image => image.naturalWidth > 0).length});
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_report_is_readable_on_a_phone(tmp_path):
    more = {"num_tokens": 1000.0, "step_time": 1.0, "tokens_per_second": 50.0, "completions/mean_length": 40.0}
    rows = [row | more | {"step": i + 1, "time/rollout": 0.5} for i, row in enumerate(healthy())]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sample = {"step": 1, "prompt": "long " * 200, "completion": "x" * 3000, "reward": 1.0}
    (tmp_path / "completions.jsonl").write_text(json.dumps(sample) + "\n")
    (tmp_path / "config.json").write_text(json.dumps({"model": "m", "dataset": "d", "reward": "a" * 300}))
    page = write_report(tmp_path)
    pictures = len(list((tmp_path / "report").glob("*.png")))
    measured = tmp_path / "measured.html"
    measured.write_text(page.read_text().replace("</body>", MEASURE + "</body>"))
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path}/profile", "--window-size=500,900", "--dump-dom"]
    result = subprocess.run([*command, f"file://{measured}"], capture_output=True, text=True, timeout=120)
    title = result.stdout.partition("<title>")[2].partition("</title>")[0]
    seen = json.loads(title)
    assert seen["width"] <= seen["window"] and seen["loaded"] == pictures >= 6
