"""TRANSFORMERS -> US. `import xverse.interop.transformers`, and its Auto classes know XVERSE.

from transformers import AutoModelForCausalLM, AutoTokenizer
import xverse.interop.transformers

tokenizer = AutoTokenizer.from_pretrained("xverse/XVERSE-7B-Chat")
model = AutoModelForCausalLM.from_pretrained("xverse/XVERSE-7B-Chat", device_map="auto")
print(model.chat(tokenizer, [{"role": "user", "content": "你好"}]))

No code in a model folder is run, with trust_remote_code or without.
"""

from importlib.metadata import PackageNotFoundError, version

from xverse.errors import XverseError

try:
    found = version("transformers")
except PackageNotFoundError:
    found = "not installed"
if not found.startswith("5."):
    raise XverseError(
        "This module needs transformers 5.",
        f"transformers is {found}.",
        'Run: pip install "xverse-llm[hf]"',
    )

from xverse.interop.transformers.auto import register
from xverse.interop.transformers.config import XverseConfig
from xverse.interop.transformers.model import XverseForCausalLM
from xverse.interop.transformers.tokenizer import XverseTokenizerFast

__all__ = ["XverseConfig", "XverseForCausalLM", "XverseTokenizerFast"]

register()
