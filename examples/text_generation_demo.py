"""The text generation page, with the flags of the published text_generation_demo.py.

python examples/text_generation_demo.py --port 20014 --model_path ./XVERSE-7B
"""

import sys

from chat_demo import main

if __name__ == "__main__":
    sys.exit(main(page="generate"))
