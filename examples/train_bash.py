"""Fine-tuning with the arguments of the published src/train_bash.py.

torchrun --nproc-per-node 8 examples/train_bash.py --stage sft --do_train \\
    --model_name_or_path xverse/XVERSE-7B --dataset alpaca_gpt4_en --template default \\
    --finetuning_type full --output_dir output --bf16 --deepspeed deepspeed.json
"""

import sys

from xverse.verbs._train_bash import main

if __name__ == "__main__":
    sys.exit(main())
