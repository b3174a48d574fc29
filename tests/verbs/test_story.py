"""From raw text to a model that answers, by nothing but the commands a person types."""

import json
from pathlib import Path

import pytest

from xverse import cli
from xverse.train.journal import last_steps, read_events

HOUSE = Path(__file__).parents[2]
READMES = {"en": "README.md", "zh": "README_zh.md", "ja": "README_ja.md"}
DENSE = {
    "model_type": "xverse",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
MIXTURE = DENSE | {"intermediate_size": 64, "num_experts": 4, "moe_top_k": 2} | {
    "num_shared_experts": 1
}  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This house's own pages in three languages, a paragraph a document: its tokenizer, shards."""
    pytest.importorskip("datatrove.pipeline.dedup")
    folder = tmp_path_factory.mktemp("story")
    pages = [(HOUSE / name, language) for language, name in READMES.items()]
    pages += [(page, "en") for page in sorted((HOUSE / "docs").glob("*.md"))]
    rows = [
        {"text": paragraph, "lang": language, "kind": "web"}
        for page, language in pages
        for paragraph in page.read_text("utf-8").split("\n\n")
        if len(paragraph) > 40
    ]
    corpus, tokenizer = folder / "corpus.jsonl", folder / "tokenizer"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    trained = ["tokenizer", "train", str(corpus), "--vocab-size", "2048", "--out", str(tokenizer)]
    assert cli.run(trained) == 0
    prepared = ["prepare", str(corpus), "--tokenizer", str(tokenizer), "--workers", "1"]
    assert cli.run([*prepared, "--out", str(folder / "shards")]) == 0
    return folder / "shards"


@pytest.mark.parametrize("shape", [DENSE, MIXTURE], ids=["dense", "mixture"])
def test_raw_text_becomes_a_model_that_answers(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str], shape: dict[str, object]
) -> None:
    """Untrained, a token costs ln 2,048 = 7.6; whoever knows how often each occurs, and nothing
    else, pays 5.7."""
    vocabulary = json.loads((shards / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    (tmp_path / "config.json").write_text(json.dumps(shape | {"vocab_size": len(vocabulary)}))
    out = tmp_path / "out"
    line = ["pretrain", str(shards), "--shape", str(tmp_path), "--out", str(out), "--device", "cpu"]
    line += ["--steps", "60", "--row-tokens", "256", "--rows-per-step", "8", "--json"]
    line += ["--update.learning-rate", "1e-2", "--update.warmup-steps", "5"]
    assert cli.run(line) == 0
    steps = last_steps(read_events(out / "run" / "metrics.jsonl"))
    assert steps[0]["loss"] > 7.4
    assert sum(steps[number]["loss"] for number in range(50, 60)) / 10 < 5.5

    capsys.readouterr()
    asked = ["generate", str(out), "A model", "--temperature", "0", "--max-tokens", "8", "--json"]
    assert cli.run([*asked, "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)
