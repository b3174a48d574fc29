"""A quantized folder is served as it is, with no option that says so."""

from pathlib import Path

import httpx

from tests.checkpoint.quantized_folders import RECIPES, write_quantized
from tests.server.inside import inside
from xverse import LLM, Sampling


def test_a_quantized_folder_is_served(tmp_path: Path) -> None:
    write_quantized(tmp_path / "m", RECIPES["int4"])
    ask = Sampling(max_tokens=6, temperature=0, repetition_penalty=1.0)
    expected = LLM(tmp_path / "m", device="cpu").generate(["the"], ask)[0].text
    with inside(tmp_path / "m") as server:
        body = {"model": "tiny", "prompt": "the", "max_tokens": 6, "temperature": 0}
        body |= {"repetition_penalty": 1.0}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["text"] == expected
