"""XVERSE_LLM as the published guide uses it."""

import asyncio
import runpy
from pathlib import Path

import pytest

from tests.data import ROOT
from tests.interop.langchain.trained_model import GREETING
from xverse import Sampling, XverseError
from xverse.interop.langchain import XVERSE_LLM


@pytest.fixture(scope="module")
def llm(trained: Path) -> XVERSE_LLM:
    return XVERSE_LLM(
        mode_name_or_path=str(trained), sampling=Sampling(temperature=0.0, max_tokens=20)
    )


def test_the_guides_lines(
    trained: Path, llm: XVERSE_LLM, capsys: pytest.CaptureFixture[str]
) -> None:
    names = runpy.run_path(str(ROOT / "examples" / "LLM.py"))
    made = names["XVERSE_LLM"](mode_name_or_path=str(trained))
    assert capsys.readouterr().out == "正在从本地加载模型...\n完成本地模型的加载\n"
    assert made._llm_type == "XVERSE_LLM"
    assert made._model is llm._model  # loaded once
    assert made("Hello", max_tokens=20, temperature=0.0) == GREETING


def test_both_spellings(trained: Path) -> None:
    assert XVERSE_LLM(model_name_or_path=str(trained)).mode_name_or_path == str(trained)
    assert XVERSE_LLM(str(trained)).mode_name_or_path == str(trained)


def test_every_way_of_asking_gives_the_answer(llm: XVERSE_LLM) -> None:
    async def later() -> tuple[str, list[str], str]:
        streamed = "".join([text async for text in llm.astream("Hello")])
        return await llm.ainvoke("Hello"), await llm.abatch(["Hello", "hi"]), streamed

    assert llm.invoke("Hello") == GREETING
    assert llm.batch(["Hello", "hi"]) == [GREETING] * 2
    assert "".join(llm.stream("Hello")) == GREETING
    assert asyncio.run(later()) == (GREETING, [GREETING] * 2, GREETING)


def test_stop_is_honoured(llm: XVERSE_LLM) -> None:
    assert llm.invoke("Hello", stop=["How"]) == "Hello! "
    assert "".join(llm.stream("Hello", stop=["How"])) == "Hello! "
    assert llm("Hello", stop=["How"]) == "Hello! "


def test_unknown_options_are_refused(llm: XVERSE_LLM) -> None:
    with pytest.raises(XverseError, match="no option 'top'"):
        llm.invoke("Hello", top=3)
