"""The pages by Gradio's own client: chat continues by session, and sessions never mix."""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError

from tests.web.live import WORDS, Echo, eventually

SETTINGS = (512, 0.5, 30, 0.85, 1.0)


def connect(address: str) -> Client:
    return Client(address, verbose=False, analytics_enabled=False)


def last(shown: list[dict[str, Any]]) -> str:
    return str(shown[-1]["content"][0]["text"])


def test_a_conversation_goes_on(address: str, echo: Echo) -> None:
    client = connect(address)
    shown = client.predict("Hello", api_name="/chat")
    assert [message["role"] for message in shown] == ["user", "assistant"]
    assert last(shown) == "[user:Hello] w0 w1"
    shown = client.predict("And?", "Too late.", "", *SETTINGS, api_name="/chat")
    assert last(shown) == "[user:Hello][assistant:[user:Hello] w0 w1][user:And?] w0 w1"


def test_system_and_exec(address: str) -> None:
    client = connect(address)
    first = client.predict("Hello", "You are.", "", *SETTINGS, api_name="/chat")
    assert last(first).startswith("[system:You are.][user:Hello]")
    second = client.predict("not sent", "Another.", '{"a": 1}', *SETTINGS, api_name="/chat")
    assert last(second).endswith('[exec:{"a": 1}] w0 w1')
    assert "Another" not in last(second)
    assert "not sent" not in last(second)


def test_the_sliders_arrive(address: str, echo: Echo) -> None:
    connect(address).predict("Hello", "", "", 7, 0, 0, 1, 1.3, api_name="/chat")
    sampling = echo.samplings[-1]
    assert (sampling.max_tokens, sampling.temperature, sampling.top_k) == (7, 0, 0)
    assert (sampling.top_p, sampling.repetition_penalty) == (1, 1.3)
    connect(address).predict("Hello", api_name="/chat")
    sampling = echo.samplings[-1]  # what is left out is the model's own
    assert (sampling.max_tokens, sampling.temperature, sampling.top_k) == (512, 0.5, 30)


def test_parallel_sessions_do_not_mix(address: str) -> None:
    def talk(name: str) -> str:
        client = connect(address)
        for turn in range(3):
            shown = client.predict(f"{name}{turn} and more", api_name="/chat")
        return "".join(str(message["content"]) for message in shown)

    names = ["A", "B", "C", "D"]
    with ThreadPoolExecutor(4) as threads:
        for name, said in zip(names, threads.map(talk, names), strict=True):
            assert f"{name}2 and more" in said
            assert not any(f"{other}1" in said for other in names if other != name)


def test_an_answer_streams_and_can_be_cancelled(address: str, echo: Echo) -> None:
    job = connect(address).submit("slowly", api_name="/chat")
    eventually(lambda: len(job.outputs()) > 3)
    texts = [last(shown) for shown in job.outputs()[1:]]
    assert all(after.startswith(before) for before, after in pairwise(texts))
    assert f"w{WORDS - 1}" not in texts[-1]
    job.cancel()
    eventually(lambda: echo.open == 0)


def test_a_failure_leaves_the_conversation_as_it_was(address: str) -> None:
    client = connect(address)
    client.predict("Hello", api_name="/chat")
    with pytest.raises(AppError, match="It said"):
        client.predict("refused", api_name="/chat")
    shown = client.predict("And?", api_name="/chat")
    assert len(shown) == 4
    assert "refused" not in last(shown)


@pytest.mark.parametrize("blank", ["", "  \n"])
def test_an_empty_message_is_refused(address: str, blank: str) -> None:
    with pytest.raises(AppError, match="no message"):
        connect(address).predict(blank, api_name="/chat")


def test_text_is_continued(address: str, echo: Echo) -> None:
    client = connect(address)
    assert client.predict("Once", api_name="/generate") == "<Once> w0 w1"
    sampling = echo.samplings[-1]  # the published first values
    assert (sampling.max_tokens, sampling.temperature) == (100, 1.0)
    assert (sampling.top_k, sampling.top_p) == (50, 0.92)
    client.predict("Once", 512, 0, 0, 0, api_name="/generate")
    sampling = echo.samplings[-1]
    assert (sampling.max_tokens, sampling.temperature) == (512, 0)
    assert (sampling.top_k, sampling.top_p) == (0, 0)


@pytest.mark.parametrize("values", [(513, 1, 50, 0.9), (100, 1.5, 50, 0.9), (100, 1, 51, 0.9)])
def test_the_published_ranges_hold(address: str, values: tuple[float, ...]) -> None:
    with pytest.raises(Exception, match=r"greater than|out of range|maximum"):
        connect(address).predict("Once", *values, api_name="/generate")


def test_only_these_calls_are_public(address: str) -> None:
    known = connect(address).view_api(return_format="dict", print_info=False)
    assert isinstance(known, dict)
    assert set(known["named_endpoints"]) == {"/chat", "/generate"}
    assert not known["unnamed_endpoints"]
