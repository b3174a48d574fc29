"""SOURCE -> WHEEL. With what is in C compiled, where there is a compiler; without it otherwise."""

import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile. The libraries know neither Python nor PyTorch, so the tag names only Linux."""
        sys.path.insert(0, self.root)
        from xverse.kernels import compile_native

        why_not = compile_native.compile_all()
        if why_not:
            self.app.display_warning(
                f"Products with integer weights are left to PyTorch, which is slower: {why_not}."
            )
            return
        for variant in compile_native.VARIANTS:
            path = compile_native.library(variant).relative_to(Path(self.root).resolve())
            build_data["artifacts"].append(str(path))
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-linux_x86_64"
