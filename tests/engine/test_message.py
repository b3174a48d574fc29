"""What processes of one engine say to each other arrives as it was said."""

import socket
import threading

import pytest

from xverse.engine.message import Line, decode_request, digest, encode_request
from xverse.engine.options import EngineOptions
from xverse.engine.request import Failed, Request, Sampling, Scores, Token
from xverse.engine.worker import Job, follow
from xverse.errors import XverseError

EVERYTHING = Sampling(
    max_tokens=5,
    temperature=0.1 + 0.2,
    top_k=3,
    top_p=0.9,
    min_p=1e-3,
    repetition_penalty=1.1,
    stop=("a", "北京\n"),
    seed=2**62 + 1,
    ignore_eos=True,
    presence_penalty=-1.5,
    frequency_penalty=0.5,
    logit_bias={17: -100.0, 3: 0.25},
    stop_ids=(7, 9),
    min_tokens=2,
    logprobs=4,
)


def lines() -> tuple[Line, Line]:
    one, other = socket.socketpair()
    return Line(one), Line(other)


@pytest.mark.parametrize(
    "request_",
    [
        Request((1, 2, 100533), EVERYTHING, "key of a user", score_from=2),
        Request((5,), Sampling(max_tokens=1).over({})),
        Request(tuple(range(9)), None, score_from=1),
    ],
)
def test_requests_arrive_whole(request_: Request) -> None:
    one, other = lines()
    one.send({"request": encode_request(request_)})
    assert decode_request(other.receive()["request"]) == request_


def test_a_job_arrives_whole() -> None:
    options = EngineOptions(kv_tokens=5000, page_size=4, deterministic=True, share_prefixes=False)
    job = Job("/models/XVERSE é", 4, "cuda", "bfloat16", 8, options)
    one, other = lines()
    one.send({"job": job.to_message()})
    assert Job.of_message(other.receive()["job"]) == job


def test_large_messages_and_the_end_of_a_line() -> None:
    one, other = lines()
    ids = list(range(300_000))
    thread = threading.Thread(target=one.send, args=[{"ids": ids}])
    thread.start()
    assert other.receive() == {"ids": ids}
    thread.join()
    one.end.close()
    with pytest.raises(EOFError):
        other.receive()


def test_digests_tell_results_apart() -> None:
    error = XverseError("a", "b", "c")
    results = [
        [],
        [Token(0, 5)],
        [Token(0, 6)],
        [Token(1, 5)],
        [Token(0, 5, "stop")],
        [Token(0, 5), Token(1, 5)],
        [Scores(0, (1.0,), True)],
        [Failed(0, error)],
    ]
    assert len({digest(result) for result in results}) == len(results)
    assert digest([Token(0, 5)]) == digest([Token(0, 5)])


class Stub:
    """An engine that always gives the same token."""

    busy = True

    def step(self) -> list[Token]:
        return [Token(0, 5)]


def test_ranks_that_differ_stop() -> None:
    one, other = lines()
    for last in ([], [Token(0, 5)], [Token(0, 6)]):
        one.send({"do": "step", "last": digest(last)})
    with pytest.raises(XverseError, match="different tokens"):
        follow(Stub(), other)  # type: ignore[arg-type]


def test_ranks_that_agree_go_on_until_stop() -> None:
    one, other = lines()
    for last in ([], [Token(0, 5)], [Token(0, 5)]):
        one.send({"do": "step", "last": digest(last)})
    one.send({"do": "stop"})
    follow(Stub(), other)  # type: ignore[arg-type]
