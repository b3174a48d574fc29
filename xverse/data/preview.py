"""SAMPLES -> TERMINAL. What a model will read, token by token, and what of it it will learn."""

from rich.console import Console
from rich.text import Text

from xverse.data.samples import Pair, Pairs, Sample, Samples
from xverse.text.tokenizer import Tokenizer

LEARNED = ("bold green", "bold green underline")  # neighbours differ, so that tokens can be told
READ = ("dim", "dim underline")
MARKS = ("⟦", "⟧")  # around what is learned, where there are no colours
SHOWN = 400  # tokens of a sample; of a longer one its beginning and its end


def show(samples: Samples | Pairs, tokenizer: Tokenizer, count: int, console: Console) -> None:
    """Print the first `count` samples (or pairs), what is learned in green, or in brackets."""
    console.print(f"What is learned is {'green' if _has_colours(console) else ' '.join(MARKS)}.")
    for number in range(1, 1 + min(count, len(samples))):
        item: Sample | Pair = samples[number - 1]
        named = _named(item) if isinstance(item, Pair) else [("", item)]
        for name, sample in named:
            learned = int(sample.learned[1:].sum())
            told = f"{len(sample.ids):,} tokens, {learned:,} learned"
            console.print(f"\n[b]{number} of {len(samples):,}[/b]{name}: {told}")
            console.print(_painted(sample, tokenizer, _has_colours(console)), soft_wrap=True)


def _named(pair: Pair) -> list[tuple[str, Sample]]:
    return [(", chosen", pair.chosen), (", rejected", pair.rejected)]


def _has_colours(console: Console) -> bool:
    return console.is_terminal and not console.no_color


def _painted(sample: Sample, tokenizer: Tokenizer, coloured: bool) -> Text:
    text = Text()
    half = SHOWN // 2
    left_out = range(half, len(sample.ids) - half)
    learning = False
    for at, id in enumerate(sample.ids.tolist()):
        if at in left_out:
            if at == half:
                text.append(f"\n... {len(left_out):,} tokens ...\n")
            continue
        learned = bool(sample.learned[at])
        if learned != learning and not coloured:
            text.append(MARKS[not learned])
        learning = learned
        text.append(_shown(tokenizer, id), (LEARNED if learned else READ)[at % 2])
    if learning and not coloured:
        text.append(MARKS[1])
    return text


def _shown(tokenizer: Tokenizer, id: int) -> str:
    """A token's text with line ends to be seen; its bytes where they are no text, or would steer
    the terminal."""
    data = tokenizer.token_bytes(id)
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return "".join(f"<0x{byte:02X}>" for byte in data)
    text = text.replace("\n", "⏎\n")
    return "".join(c if c.isprintable() or c == "\n" else f"<U+{ord(c):04X}>" for c in text)
