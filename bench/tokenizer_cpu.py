"""CORPUS -> SECONDS, BYTES A TOKEN. Our trainer beside rustbpe and `tokenizers`, and what it makes.

python -m bench.tokenizer_cpu --corpus FOLDER --published TOKENIZER

Each trainer runs in a process of its own, one after the other, over the same texts in memory. CPU
seconds stand beside wall-clock ones: they are what a busy machine does not change much.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

from bench.record import record
from xverse.data.report import Report
from xverse.data.source import Reading, Text, read_files
from xverse.device import num_cores
from xverse.text.compression import measure_compression
from xverse.text.tokenizer import Tokenizer
from xverse.text.vocabulary import train_tokenizer

VOCAB_SIZE = 32_000
# GPT-4's cuts as nanochat trains with them; a digit at a time, as XVERSE has it.
RUSTBPE_CUTS = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)


def read_corpus(folder: str) -> list[Text]:
    """All of it, in memory."""
    return list(read_files([folder], Reading(), Report()))


def train_rustbpe(texts: list[str], out: str) -> None:
    """rustbpe, on bytes."""
    import rustbpe

    rustbpe.Tokenizer().train_from_iterator(iter(texts), VOCAB_SIZE, pattern=RUSTBPE_CUTS)


def train_tokenizers(texts: list[str], out: str) -> None:
    """Hugging Face's trainer with XVERSE's cuts."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True))
    steps: list[Any] = [
        pre_tokenizers.Metaspace(prepend_scheme="never"),
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.Punctuation("isolated"),
    ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE - 263, show_progress=False)
    tokenizer.train_from_iterator(iter(texts), trainer=trainer)


def train_ours(texts: list[str], out: str) -> None:
    """XVERSE's form."""
    train_tokenizer(texts, vocab_size=VOCAB_SIZE, threads=num_cores()).save(out)


def train_improved(texts: list[str], out: str) -> None:
    """The improved form."""
    train_tokenizer(texts, vocab_size=VOCAB_SIZE, form="improved", threads=num_cores()).save(out)


TRAINERS: dict[str, Callable[[list[str], str], None]] = {
    "rustbpe": train_rustbpe,
    "tokenizers": train_tokenizers,
    "xverse": train_ours,
    "xverse improved": train_improved,
}


def time_one(name: str, corpus: str, out: str) -> dict[str, float]:
    """Seconds of one trainer, without the reading."""
    texts = [text.text for text in read_corpus(corpus)]
    wall, cpu = time.perf_counter(), time.process_time()
    TRAINERS[name](texts, out)
    return {
        "wall_s": round(time.perf_counter() - wall, 2),
        "cpu_s": round(time.process_time() - cpu, 2),
    }


def in_a_process(name: str, corpus: str, out: str) -> dict[str, float]:
    """`time_one` in a fresh process."""
    command = [sys.executable, "-m", "bench.tokenizer_cpu", "--corpus", corpus]
    told = subprocess.run(
        [*command, "--only", name, "--out", out], capture_output=True, text=True, check=True
    )
    return cast(dict[str, float], json.loads(told.stdout.splitlines()[-1]))


def compression(tokenizer: Tokenizer, texts: Iterable[Text]) -> dict[str, Any]:
    """By language, and the speed of it: encoding on every core."""
    pairs = [(text.language, text.text) for text in texts]
    wall, cpu = time.perf_counter(), time.process_time()
    found = measure_compression(tokenizer, pairs)
    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    size = sum(item.bytes for item in found.values()) / 1e6
    tokens = sum(item.tokens for item in found.values())
    return {
        "vocab_size": tokenizer.vocab_size,
        "encode_mb_per_s": round(size / seconds, 2),
        "encode_mb_per_cpu_s": round(size / cpu_seconds, 2),
        "bytes_per_token": round(1e6 * size / tokens, 3),
        "languages": {
            language: {
                "bytes_per_token": round(item.bytes_per_token, 3),
                "characters_per_token": round(item.characters_per_token, 3),
                "tokens_per_word": item.tokens_per_word and round(item.tokens_per_word, 3),
                "byte_tokens": round(item.byte_tokens / item.tokens, 4),
            }
            for language, item in found.items()
        },
    }


def main() -> None:
    """Time all, measure what two of them made and the published one, and record it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--published", help="XVERSE's own tokenizer, to compare with")
    parser.add_argument("--only", choices=TRAINERS)
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    if args.only:
        print(json.dumps(time_one(args.only, args.corpus, args.out)))
        return
    texts = read_corpus(args.corpus)
    figures: dict[str, object] = {
        "megabytes": round(sum(len(text.text.encode()) for text in texts) / 1e6, 2),
        "documents": len(texts),
        "vocab_size": VOCAB_SIZE,
        "cores": num_cores(),
    }
    with tempfile.TemporaryDirectory() as folder:
        trained = {name: in_a_process(name, args.corpus, f"{folder}/{name}") for name in TRAINERS}
        made = {name: Tokenizer.load(Path(folder) / name) for name in ("xverse", "xverse improved")}
    if args.published:
        made["published"] = Tokenizer.load(args.published)
    figures["training"] = trained
    figures["compression"] = {name: compression(one, texts) for name, one in made.items()}
    print(record("tokenizer_cpu", figures, ("tokenizers", "rustbpe", "numpy")))


if __name__ == "__main__":
    main()
