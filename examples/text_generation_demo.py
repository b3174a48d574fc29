"""The text generation page, with the flags of the published text_generation_demo.py.

python examples/text_generation_demo.py --port 20014 --model_path ./XVERSE-7B
"""

import sys
from collections.abc import Sequence

import chat_demo


def main(args: Sequence[str] | None = None) -> int:
    """Serve the page. Exit codes: 0 ended, 1 failed, 2 a flag that is not known."""
    return chat_demo.serve_page("generate", args, port=20014, model="./XVERSE-7B")


if __name__ == "__main__":
    sys.exit(main())
