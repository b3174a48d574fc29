"""NAMES -> SAMPLING RATIOS. The tables that XVERSE published for the training of its 65B model."""

# Per cent, from the README of github.com/xverse-ai/XVERSE-65B, updated 2023-11-24.
KINDS = {
    "web": 72.91,
    "code": 7.09,
    "encyclopedia": 4.81,
    "books": 5.62,
    "papers": 6.55,
    "qa": 1.15,
    "other": 1.87,
}

# 41 natural languages, by ISO 639-1 code; the table's "iw" is Hebrew, today "he".
# fmt: off
LANGUAGES = {
    "en": 54.91, "zh": 31.09, "ja": 3.22, "ru": 3.15, "de": 1.52, "es": 0.91, "fr": 0.73,
    "pl": 0.48, "it": 0.36, "pt": 0.34, "cs": 0.27, "uk": 0.24, "tr": 0.23, "nl": 0.20,
    "hu": 0.19, "ko": 0.18, "sv": 0.15, "el": 0.14, "fi": 0.14, "id": 0.13, "vi": 0.13,
    "ar": 0.12, "ro": 0.11, "bg": 0.10, "th": 0.10, "da": 0.09, "mr": 0.08, "sk": 0.08,
    "fa": 0.07, "hi": 0.07, "no": 0.07, "ca": 0.06, "he": 0.06, "lt": 0.05, "ms": 0.05,
    "sl": 0.05, "et": 0.04, "lv": 0.03, "sr": 0.03, "ta": 0.03, "kk": 0.02,
}

# Programming languages, within the kind "code".
CODE = {
    "php": 17.06, "javascript": 15.65, "java": 15.18, "python": 14.64, "typescript": 6.55,
    "c": 4.84, "c++": 4.68, "c#": 3.44, "go": 3.38, "rust": 2.33, "ruby": 1.61, "swift": 1.40,
    "kotlin": 1.40, "scala": 1.08, "dart": 0.95, "sql": 0.76, "shell": 0.74, "haskell": 0.46,
    "common lisp": 0.43, "perl": 0.34, "css": 0.32, "julia": 0.32, "visual basic": 0.25,
    "ocaml": 0.24, "powershell": 0.23, "groovy": 0.21, "pascal": 0.20, "fortran": 0.19,
    "elixir": 0.17, "solidity": 0.16, "f#": 0.14, "erlang": 0.14, "arduino": 0.13,
    "assembly": 0.13, "clojure": 0.12, "cuda": 0.12, "vhdl": 0.09, "emacs lisp": 0.08,
    "objective-c++": 0.08, "crystal": 0.06, "r": 0.04, "abap": 0.01, "cobol": 0.0022,
    "verilog": 0.0001,
}
# fmt: on

PRESETS = {"xverse-65b": {"kinds": KINDS, "languages": LANGUAGES, "code": CODE}}
