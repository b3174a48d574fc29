"""LANGCHAIN -> US. `ChatXverse`, a chat model, and `XVERSE_LLM`, the class of the published guide.

from xverse.interop.langchain import ChatXverse

chat = ChatXverse(model="xverse/XVERSE-7B-Chat")                    # in this process
chat = ChatXverse(model="xverse", base_url="http://127.0.0.1:8000/v1")  # or over HTTP
print(chat.invoke("你好").content)
"""

from xverse.errors import XverseError

try:
    import httpx as _httpx
    import langchain_core as _langchain_core
except ImportError as missing:
    raise XverseError(
        "This module needs langchain-core and httpx.",
        str(missing),
        'Run: pip install "xverse-llm[langchain]"',
    ) from missing

from xverse.interop.langchain.chat import ChatXverse
from xverse.interop.langchain.guide import XVERSE_LLM

ChatXVERSE = ChatXverse

__all__ = ["XVERSE_LLM", "ChatXVERSE", "ChatXverse"]

del _httpx, _langchain_core
