"""What is claimed can be looked up: the page of figures and the results name each other."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
NOT_ON_THE_PAGE = {
    "decode_cpu",  # older than batch_cpu, which says more
    "eval_host_cpu",  # what the host does of eval_h200
    "fp8_quality_smollm2-135m-instruct",  # docs/quantize.md has them
    "kv_door_h200",  # the plain decoder's way, which the fused step has left behind
    "quant_quality_smollm2-135m-instruct",
}


def test_every_figure_has_its_file() -> None:
    page = (ROOT / "docs" / "figures.md").read_text("utf-8")
    rows = [row for row in page.splitlines() if row.startswith("| ")]
    named = {name for row in rows for name in re.findall(r"`([\w-]+)`", row.rsplit("|", 2)[1])}
    kept = {file.stem for file in (ROOT / "bench" / "results").glob("*.json")}
    assert kept - named == NOT_ON_THE_PAGE
    assert named <= kept
