"""Talk with a model in the terminal; history is kept."""

import contextlib
import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from xverse.verbs._options import AdapterOption, ModelOptions, SamplingOptions

if TYPE_CHECKING:
    from xverse.engine.llm import LLM
    from xverse.engine.request import Piece, Sampling

HELP = """\
  exit, quit, /exit    leave (Ctrl-D too)
  /reset               forget the conversation
  /system TEXT         set the system message, and start anew
  /help                this list
  \"\"\"                  begins and ends a message of several lines"""


@dataclass(frozen=True, kw_only=True)
class Config(ModelOptions, AdapterOption, SamplingOptions):
    """What `xverse chat` takes."""

    model: Annotated[str | None, tyro.conf.Positional] = None
    """Folder, GGUF file, alias or hub id; the built-in model where none is given."""
    system: str | None = None
    """System message that every conversation begins with."""
    json: bool = False
    """Print one JSON object an answer instead of text."""


def run(config: Config) -> int:
    """Hold a conversation on standard input and output, until `exit` or the end of input."""
    from xverse.checkpoint.resolve import DEFAULT_MODEL

    llm = config.load(config.model or DEFAULT_MODEL, config.adapter)
    talk = Conversation(
        llm,
        config.sampling(),
        config.system,
        as_json=config.json,
        adapter=config.adapter_name,
    )
    interactive = sys.stdin.isatty()
    if not config.json:
        _greet(llm, chosen=config.model is not None, interactive=interactive)
    while True:
        message = _read_message(interactive)
        if message is None or message.strip() in ("exit", "quit", "/exit", "/quit"):
            break
        if message.strip():
            talk.hear(message)
    if interactive:
        print("next: xverse generate MODEL PROMPT, or xverse show MODEL", file=sys.stderr)
    return 0


class Conversation:
    """The messages so far, and what a line of input does to them."""

    def __init__(
        self,
        llm: "LLM",
        sampling: "Sampling",
        system: str | None,
        *,
        as_json: bool = False,
        adapter: str | None = None,
    ) -> None:
        self.llm, self.sampling, self.as_json, self.adapter = llm, sampling, as_json, adapter
        self.system = system
        self.messages: list[dict[str, object]] = []
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def hear(self, message: str) -> None:
        """A line from the user: a command, or a message that is answered."""
        command, _, rest = message.strip().partition(" ")
        if command == "/help":
            print(HELP)
        elif command == "/reset":
            self.reset()
            print("(a new conversation)")
        elif command == "/system":
            self.system = rest.strip() or None
            self.reset()
            print("(a new conversation, with the system message " + ("set)" if rest else "gone)"))
        elif command.startswith("/") and command[1:].isalpha():
            print(f"There is no command {command}. The commands are:\n{HELP}")
        else:
            self._answer(message)

    def _answer(self, message: str) -> None:
        self.messages.append({"role": "user", "content": message})
        if not self.as_json:
            print(f"{self.llm.title}: ", end="", flush=True)
        text = ""
        try:
            pieces = self.llm.chat_stream(self.messages, self.sampling, adapter=self.adapter)
            last: Piece | None = None
            for last in pieces:
                text += last.text
                if not self.as_json:
                    print(last.text, end="", flush=True)
        except KeyboardInterrupt:
            print(" (stopped)", end="")
            last = None
        self.messages.append({"role": "assistant", "content": text})
        finish = last.finish if last else "interrupted"
        if self.as_json:
            print(json.dumps({"text": text, "finish": finish}, ensure_ascii=False), flush=True)
            return
        print()
        if finish == "length":
            print("(the answer was cut at its token limit; --max-tokens raises it)")


def _greet(llm: "LLM", *, chosen: bool, interactive: bool) -> None:
    print(f"This is {llm.title}, on {next(llm.decoder.parameters()).device}.")
    if not chosen:
        print("It is small, for trying things out. Another: xverse chat xverse/XVERSE-7B-Chat,")
        print("or any folder, GGUF file or hub id of an XVERSE or Llama model.")
    if interactive:
        print("Type a message; /help tells what else you can type, exit leaves.\n")


def _read_message(interactive: bool) -> str | None:
    """One line, or several between lines of three quotes; None at the end of input."""
    line = _read_line("you: " if interactive else "")
    if line is None or not line.lstrip().startswith('"""'):
        return line
    lines = [line.lstrip()[3:]]
    while not lines[-1].rstrip().endswith('"""'):
        more = _read_line("...  " if interactive else "")
        if more is None:
            return "\n".join(lines).strip("\n")
        lines.append(more)
    return "\n".join(lines).rstrip().removesuffix('"""').strip("\n")


def _read_line(prompt: str) -> str | None:
    if prompt:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (line editing and history, where the system has it)
    try:
        return input(prompt)
    except EOFError:
        if prompt:
            print()
        return None
