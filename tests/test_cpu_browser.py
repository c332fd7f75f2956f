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
const color = element => getComputedStyle(element).color;
document.title = JSON.stringify({width: document.documentElement.scrollWidth, window: innerWidth,
  drawn: [...document.querySelectorAll("svg")].filter(one => one.getBoundingClientRect().height > 100).length,
  page: color(document.body), ink: getComputedStyle(document.querySelector("svg text")).fill});
</script>"""
DARK, LIGHT = 0, 1


def written(folder):
    more = {"num_tokens": 1000.0, "step_time": 1.0, "tokens_per_second": 50.0, "completions/mean_length": 40.0}
    rows = [row | more | {"step": i + 1, "time/rollout": 0.5} for i, row in enumerate(healthy())]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sample = {"step": 1, "group": 0, "prompt": "long " * 200, "completion": "x" * 3000, "reward": 1.0, "length": 90}
    tokens = {"tokens": ["x" * 90] * 90, "logprobs": [-1.0] * 90, "answer": "a" * 400}
    group = [sample | tokens | {"member": i} for i in range(8)]
    (folder / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in group))
    (folder / "config.json").write_text(json.dumps({"model": "m" * 90, "dataset": "d", "reward": "a" * 300}))
    (folder / "command.txt").write_text("python -m minigrpo.train --reward=" + "a" * 300)
    return write_report(folder)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize(("width", "scheme"), [(500, LIGHT), (1200, DARK)])
def test_the_report_is_readable_on_a_phone_and_in_the_dark(width, scheme, tmp_path):
    page = written(tmp_path)
    pictures = len(list((tmp_path / "report").glob("*.png")))
    measured = tmp_path / "measured.html"
    measured.write_text(page.read_text().replace("</body>", MEASURE + "</body>"))
    own = [f"--user-data-dir={tmp_path}/profile", f"--window-size={width},900", "--dump-dom"]
    command = [CHROMIUM, *FLAGS, *own, f"--blink-settings=preferredColorScheme={scheme}", f"file://{measured}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    title = result.stdout.partition("<title>")[2].partition("</title>")[0].replace("&quot;", '"')
    seen = json.loads(title)
    assert seen["width"] <= seen["window"] and seen["drawn"] == pictures >= 6
    assert seen["ink"] == seen["page"] == ("rgb(255, 255, 255)" if scheme == DARK else "rgb(0, 0, 0)")
