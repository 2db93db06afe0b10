"""`python -m ming_core.training lora` trains a LoRA.

Without `lora` it runs `python -m tiny_shapes.training`, its new name, for one more release.
"""

import runpy
import sys
import warnings

if __name__ == "__main__":
    if sys.argv[1:2] == ["lora"]:
        from .command import main

        sys.exit(main(sys.argv[2:]))
    warnings.warn("ming_core.training is now tiny_shapes.training: use the new name", DeprecationWarning, stacklevel=1)
    runpy.run_module("tiny_shapes.training", run_name="__main__", alter_sys=True)
