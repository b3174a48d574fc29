"""FIXTURE. A tokenizer of a few hundred ids, laid out as the published XVERSE one is."""

import json
from pathlib import Path

SPECIALS = (
    "<sep>",
    "<pad>",
    "<|startoftext|>",
    "<|endoftext|>",
    "<|endofprompt|>",
    "<|endofknowledge|>",
)
HAN = (
    "一上不中为习人今他们会你候元到助华去又吗和哪国在型大天好学家小市年很怎您想"
    "我新日时是景智有机来样格气河海点爱的看知练能言话语说请谁谢象这都里问题高魔"
)
MERGES = (
    "▁ t",
    "h e",
    "▁t he",
    "i n",
    "e r",
    "o n",
    "▁ a",
    "l l",
    "▁ H",
    "▁ T",
    "▁T he",
    "▁ U",
    "o u",
    "i s",
    "▁ is",
)
CONFIG: dict[str, object] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "pad_token": "<pad>",
    "clean_up_tokenization_spaces": True,
    "model_max_length": 1e30,
}


def tiny_tokenizer_json(legacy: bool = True) -> dict[str, object]:
    """tokenizer.json of the tiny tokenizer, in the published (legacy) or the modern form.

    Ids: 0-5 specials, then single characters in code point order (so ASCII has the ids of the real
    tokenizer: "!" is 36, "0" is 51, "A" is 68, "a" is 100), merges, "\\n", 256 byte tokens.
    """
    ascii_characters = [chr(code) for code in range(128) if chr(code) not in "\n\r "]
    tokens = [*SPECIALS, *sorted([*ascii_characters, "·", "▁", *HAN])]
    tokens += [pair.replace(" ", "") for pair in MERGES]
    tokens += ["\n", *(f"<0x{byte:02X}>" for byte in range(256))]
    metaspace: dict[str, object] = {"type": "Metaspace", "replacement": "▁"}
    metaspace |= {"add_prefix_space": False} if legacy else {"prepend_scheme": "never"}
    if not legacy:
        metaspace["split"] = True
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": index,
                "content": content,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for index, content in enumerate(SPECIALS)
        ],
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                dict(metaspace),
                {"type": "Digits", "individual_digits": True},
                {"type": "Punctuation", "behavior": "Isolated"},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [dict(metaspace), {"type": "ByteFallback"}]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": True,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": list(MERGES),
        },
    }


def write_tiny_tokenizer(folder: Path, legacy: bool = True) -> None:
    """Write tokenizer.json and tokenizer_config.json of the tiny tokenizer into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps(tiny_tokenizer_json(legacy), ensure_ascii=False)
    (folder / "tokenizer.json").write_text(content, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
