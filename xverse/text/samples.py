"""FILE -> ROWS OF IDS. Text or conversations, cut into samples to measure or calibrate with."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from xverse.errors import XverseError
from xverse.files import parse_json
from xverse.log import logger
from xverse.text.chat import chat_format
from xverse.text.tokenizer import Tokenizer

MAX_LINE_BYTES = 64 * 2**20  # of one text; more is a whole corpus, and a mistake
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names


def read_samples(
    file: str | Path,
    tokenizer: Tokenizer,
    config: Mapping[str, object],
    *,
    length: int,
    count: int | None = None,
) -> list[list[int]]:
    """Rows of `length` ids from a file: at most `count`, evenly spread over it.

    A .jsonl file has an object a line: {"text": ...}, {"messages": [...]} or ShareGPT's
    {"conversations": [...]}, which are written as the model of this config.json reads them. Any
    other file is one text. Texts follow one another, an end-of-text id between them; what is left
    at the end makes a shorter row. XverseError where the file is malformed or empty.
    """
    assert length > 1
    path = Path(file).expanduser()
    try:
        ids = [id for text in _texts(path, tokenizer, config) for id in text]
    except (OSError, UnicodeDecodeError) as error:
        raise XverseError(
            f"The samples {str(path)!r} cannot be read.",
            str(error),
            "Give a UTF-8 text file, or .jsonl with a text or a conversation a line.",
        ) from error
    rows = [ids[start : start + length] for start in range(0, len(ids), length)]
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise XverseError(
            f"The samples {str(path)!r} hold no text.",
            "There is nothing to show to the model.",
            "Give a file of text like that which the model will meet.",
        )
    if count is None or len(rows) <= count:
        return rows
    logger.info("%s: %d of its %d samples are used, evenly spread", path.name, count, len(rows))
    return [rows[place * len(rows) // count] for place in range(count)]


def _texts(path: Path, tokenizer: Tokenizer, config: Mapping[str, object]) -> Iterator[list[int]]:
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    if path.suffix != ".jsonl":
        yield tokenizer.encode(path.read_text("utf-8"))
        return
    with path.open("rb") as lines:
        for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE_BYTES), b""), 1):
            if not line.strip():
                continue
            try:
                entry = parse_json(line)
                yield _line(entry, tokenizer, config, end)
            except (ValueError, XverseError) as error:
                raise XverseError(
                    f"Line {number} of {path} is not a sample.",
                    str(error),
                    'A line is {"text": ...}, {"messages": [...]} or {"conversations": [...]}.',
                ) from error


def _line(
    entry: Mapping[str, object],
    tokenizer: Tokenizer,
    config: Mapping[str, object],
    end: list[int],
) -> list[int]:
    text = entry.get("text")
    if isinstance(text, str):
        return [*tokenizer.encode(text), *end]
    turns = entry.get("messages", entry.get("conversations"))
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"it has the keys {', '.join(map(repr, list(entry)[:8]))}")
    messages = [_message(turn) for turn in turns]
    chat = chat_format(config, tokenizer)
    return chat.render(messages, tokenizer, add_generation_prompt=False).ids


def _message(turn: Mapping[str, object]) -> Mapping[str, object]:
    if "from" not in turn:
        return turn
    role = str(turn["from"])
    return {"role": ROLES.get(role, role), "content": turn.get("value")}
