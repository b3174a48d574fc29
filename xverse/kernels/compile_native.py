"""C -> LIBRARIES. Compile `*_cpu.c` at installation, where there is a C compiler.

Run by hatch_build.py when a wheel or an editable install is made; by hand, `python -m
xverse.kernels.compile_native`. It knows nothing of the package, which is not installed yet.
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = [HERE / f"{name}_cpu.c" for name in ("multiply", "rows", "attend", "decode", "update")]
VARIANTS = {  # by what the CPU must have; each is a library of its own, chosen when it is loaded
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mfma"],
    "avx2": ["-mavx2", "-mfma"],
}
FLAGS = ["-O3", "-std=c11", "-fPIC", "-shared", "-fopenmp"]
# Products and sums are not contracted, so that what is rounded is rounded as PyTorch does.
EXACT = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]


def library(variant: str) -> Path:
    """Where the library of that variant is, if it has been compiled."""
    return HERE / f"_native_{variant}.so"


def compile_all() -> str:
    """Compile every variant beside the source; why not, or nothing where all went well."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        return f"the source is for Linux on x86-64, and this is {sys.platform} {platform.machine()}"
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler is None:
        return "there is no C compiler"
    for variant, instructions in VARIANTS.items():
        out = library(variant)
        made = out.with_suffix(f".{os.getpid()}")  # renamed when whole: another may be loading it
        files = [*map(str, SOURCES), "-o", str(made), "-lm"]
        command = [compiler, *FLAGS, *EXACT, *instructions, *files]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            made.unlink(missing_ok=True)
            lines = done.stderr.strip().splitlines()
            return f"{compiler} failed: {lines[0] if lines else done.returncode}"
        made.replace(out)
    return ""


if __name__ == "__main__":
    sys.exit(compile_all())
