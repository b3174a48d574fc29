"""FIXTURE. A very small model taught a few conversations by heart: it greets, jokes, calls tools.

The standard tests of LangChain need a model that calls a tool when that is apt and fills in
arguments from the question. A random one cannot; this one is trained in five seconds.
"""

import json
from pathlib import Path

import torch
from langchain_core.utils.function_calling import convert_to_openai_tool
from langchain_tests.integration_tests.chat_models import (
    magic_function,
    magic_function_no_args,
    unicode_customer,
)
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch.nn import functional

from xverse.checkpoint.convert import save_weights
from xverse.engine.form import CALL_OPENING
from xverse.model.cache import Packed
from xverse.model.decoder import Decoder, initialize
from xverse.model.shape import ModelShape
from xverse.text.chat import V2
from xverse.text.tokenizer import Tokenizer
from xverse.text.tools import END, render_tools

Message = dict[str, object]
SPECIALS = ["<pad>", "<|startoftext|>", "<|endoftext|>"]
STEPS, WARMUP, RATE, GOOD_ENOUGH = 300, 10, 1e-2, 0.005  # some 50 steps of 0.06 s suffice
GENERATION = {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}


def get_weather(location: str) -> str:
    """Get the weather at a location."""
    return "It's sunny."


def greeting_generator(answer_style: str) -> str:
    """Generate a greeting in a particular style of speaking."""
    return f"A greeting like a {answer_style}'s."


def my_adder_tool(a: int, b: int) -> int:
    """Takes two integers, a and b, and returns their sum."""
    return a + b


def joke(setup: str, punchline: str) -> str:
    """Joke to tell user."""
    return f"{setup} {punchline}"


JOKE = {"setup": "Why do cats nap?", "punchline": "They are dogs."}
JOKE_TOOLS = [convert_to_openai_tool(joke), convert_to_openai_tool(joke)]
for spec, title in zip(JOKE_TOOLS, ("Joke", "JokeDict"), strict=True):
    spec["function"]["name"] = title
GREETING = "Hello! How can I help you?"
SUNNY = "The weather there is sunny."


def user(text: str) -> Message:
    """A question."""
    return {"role": "user", "content": text}


def call(name: str, **arguments: object) -> str:
    """A call as the model writes it, from its opening on."""
    body = json.dumps({"api_name": name, "parameters": arguments}, ensure_ascii=False)
    return f"{CALL_OPENING}{body}```{END}"


def lessons() -> list[tuple[list[Message], str]]:
    """Conversations without tools in them, and what is to be said then."""
    weather = [convert_to_openai_tool(get_weather)]
    question = "What is the weather in San Francisco, CA?"
    called = call("get_weather", location="San Francisco, CA")
    found: list[tuple[list[Message], str]] = [
        ([user("Hello")], GREETING),
        ([user("hi")], GREETING),
        ([user("Hey")], GREETING),
        ([user("hello"), {"role": "assistant", "content": "hello"}, user("how are you")], GREETING),
        ([user("Write me 2 haikus. Only include the haikus.")], "Old pond.\nA frog jumps in."),
        ([asked(weather, question)], called),
        (
            [
                asked(weather, question),
                {"role": "assistant", "content": called},
                {"role": "exec", "content": "It's sunny."},
            ],
            SUNNY,
        ),
    ]
    for tool, text, arguments in (
        (magic_function, "What is the value of magic_function(3)? Use the tool.", {"input": 3}),
        (
            magic_function_no_args,
            "What is the value of magic_function_no_args()? Use the tool.",
            {},
        ),
        (
            greeting_generator,
            "Using the tool, generate a Pirate greeting.",
            {"answer_style": "Pirate"},
        ),
        (
            unicode_customer,
            "Create a customer named '你好啊集团' (Hello Group) - a Chinese technology company",
            {"customer_name": "你好啊集团", "description": "technology"},
        ),
        (
            unicode_customer,
            "Create a customer named 'こんにちは株式会社' (Hello Corporation) - a Japanese company",
            {"customer_name": "こんにちは株式会社", "description": "technology"},
        ),
        (my_adder_tool, "What is 3 + 4", {"a": 3, "b": 4}),
    ):
        spec = convert_to_openai_tool(tool)
        found.append(([asked([spec], text)], call(spec["function"]["name"], **arguments)))
    both = [convert_to_openai_tool(magic_function), *weather]
    found.append(([asked(both, "Hello!")], call("magic_function", input=3)))
    for text in (
        "Tell me a joke about cats.",
        "Give me the setup to a joke about cats, no punchline.",
        "Give me a joke about cats, include the punchline.",
        "Tell me a joke about cats. Return the result as a JSON with 'setup' and 'punchline' keys. "
        "Return nothing other than JSON.",
    ):
        found.append(([user(text)], json.dumps(JOKE)))
        found.append(([asked(JOKE_TOOLS[:1], text)], call("Joke", **JOKE)))
    found.append(([asked(JOKE_TOOLS[1:], "Tell me a joke about cats.")], call("JokeDict", **JOKE)))
    return found


def asked(tools: list[dict[str, object]], question: str) -> Message:
    """A question with tools at hand, as the format writes it."""
    return user(render_tools(tools, question))


def write_trained_folder(folder: Path) -> Path:
    """Teach the model and write it down."""
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(folder)
    config = _config(tokenizer.vocab_size)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    decoder = initialize(Decoder(ModelShape.from_config(config)), std=0.05)
    _teach(decoder, tokenizer)
    save_weights(decoder.state_dict().items(), folder)
    return folder


def _tokenizer(folder: Path) -> Tokenizer:
    """Words of the lessons are tokens, so that prompts are short."""
    texts = [str(message["content"]) for turns, _ in lessons() for message in turns]
    texts += [answer for _, answer in lessons()] + ["Human: Assistant: Exec: \n\n"]
    backend = Backend(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), words])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts * 2, trainer)
    backend.save(str(folder / "tokenizer.json"))
    told = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": SPECIALS[0],
        "bos_token": SPECIALS[1],
        "eos_token": SPECIALS[2],
        "xverse_chat_format": "v2",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    return Tokenizer.load(folder)


def _config(vocab_size: int) -> dict[str, object]:
    return {
        "architectures": ["XverseForCausalLM"],
        "model_type": "xverse",
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        **GENERATION,
    }


def _encoded(tokenizer: Tokenizer, turns: list[Message], answer: str) -> tuple[list[int], int]:
    """Ids of a conversation with its answer, and how many of them the answer has."""
    prompt = V2.render(turns, tokenizer, add_generation_prompt=True).ids
    parts = [answer]
    if answer.startswith(CALL_OPENING):  # a demanded call is between these two, and they alone
        close = f"```{END}"
        parts = [CALL_OPENING, answer.removeprefix(CALL_OPENING).removesuffix(close), close]
    said = [id for part in parts for id in tokenizer.encode(part, add_special=False)]
    assert tokenizer.eos_id is not None
    return [*prompt, *said, tokenizer.eos_id], len(said) + 1


def _teach(decoder: Decoder, tokenizer: Tokenizer) -> None:
    """Until the answers are known by heart, whatever the time in the prompt is."""
    taught = [_encoded(tokenizer, *lesson) for lesson in lessons()]
    ids_T = torch.tensor([id for ids, _ in taught for id in ids])
    lengths = torch.tensor([len(ids) for ids, _ in taught])
    counts = torch.tensor([said for _, said in taught])
    kv, ends = Packed(lengths.tolist()), lengths.cumsum(0)
    spans = zip(ends.tolist(), counts.tolist(), strict=True)
    rows = torch.cat([torch.arange(end - said, end) for end, said in spans])
    nine = torch.tensor([tokenizer.encode(str(n), add_special=False)[0] for n in range(10)])
    digits = torch.isin(ids_T, nine)
    digits[rows] = False
    digits &= _in_runs(digits)
    optimizer = torch.optim.AdamW(decoder.parameters())
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / WARMUP)
        ids_T[digits] = nine[torch.randint(10, (int(digits.sum()),))]
        loss = functional.cross_entropy(decoder(ids_T, kv.positions(), kv, rows - 1), ids_T[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < GOOD_ENOUGH:
            return
    raise AssertionError(f"the model has not learned its lessons: {loss.item():.3f}")


def _in_runs(found_T: torch.Tensor) -> torch.Tensor:
    """Those that stand side by side: digits of times, and not the 3 in "magic_function(3)"."""
    before, after = found_T.roll(1), found_T.roll(-1)
    return found_T & (before | after)
