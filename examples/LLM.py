"""The module of the published LangChain guide: `from LLM import XVERSE_LLM`."""

from xverse.interop.langchain import XVERSE_LLM

__all__ = ["XVERSE_LLM"]
