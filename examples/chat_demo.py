"""The chat page, with the flags of the published chat_demo.py.

python examples/chat_demo.py --port 36000 --model_path ./XVERSE-7B-Chat
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Literal


def main(args: Sequence[str] | None = None) -> int:
    """Serve the page. Exit codes: 0 ended, 1 failed, 2 a flag that is not known."""
    return serve_page("chat", args, port=36000, model="./XVERSE-7B-Chat")


def serve_page(
    page: Literal["chat", "generate"], args: Sequence[str] | None, *, port: int, model: str
) -> int:
    """What both scripts do, with the port and the model that each has by default."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--port", type=int, default=port, help=f"port to listen at ({port})")
    parser.add_argument("--model_path", default=model, help=f"folder of the model ({model})")
    parser.add_argument("--tokenizer_path", help="folder of the tokenizer (the model's)")
    parser.add_argument("--title", help="what the page calls the model (the folder's name)")
    config = parser.parse_args(args)

    from xverse.engine.llm import LLM
    from xverse.errors import XverseError
    from xverse.web.client import InProcess
    from xverse.web.site import listen, serve

    try:
        with listen("127.0.0.1", config.port) as at:
            llm = LLM(config.model_path, tokenizer=config.tokenizer_path)
            client = InProcess(llm, config.title)
            print(f"{client.title} is at http://127.0.0.1:{at.getsockname()[1]}/", flush=True)
            serve(client, at, page=page)
    except XverseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
