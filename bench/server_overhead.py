"""WHAT THE SERVER COSTS. SmolLM2 on this CPU: through HTTP and in this process, in turn.

`python -m bench.server_overhead`: one request after another, where the difference in time is the
server's, and 64 streams at once beside the same 64 prompts in process, where the ratio of tokens a
second is. Every round has both ways, so that a busy neighbour slows both; medians count. Client,
server and engine share the machine's cores.
"""

import argparse
import http.client
import json
import selectors
import socket
import statistics
import time
from contextlib import closing

import torch

from bench.record import record
from tests.server.served import Served, serve, wait
from xverse import LLM, Sampling

MODEL = "smollm2"
PATH = "/v1/completions"
PROMPT = "The capital of France is"
ALLOWED_MS = 2.0
ALLOWED_RATIO = 0.95
DONE = b"data: [DONE]\n\n"


def options(tokens: int) -> Sampling:
    """Greedy answers of this many tokens."""
    return Sampling(temperature=0.0, max_tokens=tokens, ignore_eos=True)


def body(prompt: str, tokens: int, *, stream: bool) -> bytes:
    """The same over HTTP."""
    asked = {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "stream": stream}
    return json.dumps({**asked, "temperature": 0, "ignore_eos": True}).encode()


def alone(llm: LLM, served: Served, count: int, tokens: int) -> dict[str, object]:
    """Milliseconds of one request on a connection that stays open, either way."""
    inside: list[float] = []
    over: list[float] = []
    with closing(http.client.HTTPConnection("127.0.0.1", served.port)) as connection:
        asked = body(PROMPT, tokens, stream=False)
        for number in range(-2, count):  # the first two warm up
            began = time.perf_counter()
            text = llm.generate(PROMPT, options(tokens)).text
            between = time.perf_counter()
            connection.request("POST", PATH, asked, {"content-type": "application/json"})
            answer = json.loads(connection.getresponse().read())
            ended = time.perf_counter()
            assert answer["choices"][0]["text"] == text
            if number >= 0:
                inside.append(1000 * (between - began))
                over.append(1000 * (ended - between))
    differences = [later - earlier for earlier, later in zip(inside, over, strict=True)]
    low, middle, high = statistics.quantiles(differences, n=4)
    return {
        "requests": count,
        "new_tokens": tokens,
        "in_process_ms_median": round(statistics.median(inside), 2),
        "server_ms_median": round(statistics.median(over), 2),
        "overhead_ms_quartiles": [round(low, 2), round(middle, 2), round(high, 2)],
    }


def together(llm: LLM, served: Served, rounds: int, streams: int, tokens: int) -> dict[str, object]:
    """Tokens a second of many at once, either way, and their ratio round by round."""
    prompts = [f"{number} reasons to visit Paris:" for number in range(streams)]
    inside: list[float] = []
    over: list[float] = []
    for number in range(-1, rounds):  # the first warms up
        began = time.perf_counter()
        answers = llm.generate(prompts, options(tokens))
        between = time.perf_counter()
        flood(served.port, [body(prompt, tokens, stream=True) for prompt in prompts])
        ended = time.perf_counter()
        assert all(len(answer.tokens) == tokens for answer in answers)
        if number >= 0:
            inside.append(streams * tokens / (between - began))
            over.append(streams * tokens / (ended - between))
            print(f"{inside[-1]:.0f} tokens/s in process, {over[-1]:.0f} streamed", flush=True)
    ratios = [later / earlier for earlier, later in zip(inside, over, strict=True)]
    return {
        "streams": streams,
        "new_tokens": tokens,
        "in_process_tokens_per_s": [round(value, 1) for value in inside],
        "server_tokens_per_s": [round(value, 1) for value in over],
        "ratios": [round(value, 3) for value in ratios],
        "ratio_median": round(statistics.median(ratios), 3),
    }


def flood(port: int, bodies: list[bytes]) -> None:
    """Ask all at once and read every stream to its [DONE]: plain sockets, since a client that
    works hard takes the cores from the engine."""
    waiting = selectors.DefaultSelector()
    head = f"POST {PATH} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    for asked in bodies:
        connection = socket.create_connection(("127.0.0.1", port))
        connection.sendall(f"{head}content-length: {len(asked)}\r\n\r\n".encode() + asked)
        waiting.register(connection, selectors.EVENT_READ, bytearray())
    left = len(bodies)
    while left:
        for key, _ in waiting.select():
            assert isinstance(key.fileobj, socket.socket)
            data = key.fileobj.recv(2**16)
            key.data.extend(data)
            if not data or key.data.endswith(b"0\r\n\r\n"):
                assert DONE in key.data, bytes(key.data[-500:])
                waiting.unregister(key.fileobj)
                key.fileobj.close()
                left -= 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=4, help="of each of these")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--stream-tokens", type=int, default=64)
    asked = parser.parse_args()
    llm = LLM(MODEL)
    with serve(MODEL, "--served-model-name", MODEL, threads=torch.get_num_threads()) as served:
        wait(served.ready)
        one = alone(llm, served, asked.requests, asked.tokens)
        print(one, flush=True)
        many = together(llm, served, asked.rounds, asked.streams, asked.stream_tokens)
    figures: dict[str, object] = {
        "model": "SmolLM2-135M-Instruct",
        "threads": torch.get_num_threads(),
        "one_at_a_time": one,
        "at_once": many,
    }
    print(json.dumps(many))
    print(record("server_overhead", figures, ("fastapi", "uvicorn", "msgspec")))
    quartiles, ratio = one["overhead_ms_quartiles"], many["ratio_median"]
    assert isinstance(quartiles, list)
    assert isinstance(ratio, float)
    assert quartiles[1] < ALLOWED_MS, quartiles
    assert ratio >= ALLOWED_RATIO, ratio


if __name__ == "__main__":
    main()
