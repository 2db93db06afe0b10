"""Train a LoRA: python -m ming_core.training lora --help

The training of the built-in model is python -m tiny_shapes.training, its ablation python -m tiny_shapes.ablation; here
they can be had under their former names, without a word and with "ablation".
"""

import runpy
import sys
import warnings

if __name__ == "__main__":
    if sys.argv[1:2] in (["-h"], ["--help"]):
        sys.exit(print(__doc__.strip()))
    if sys.argv[1:2] == ["lora"]:
        from .command import main

        sys.exit(main(sys.argv[2:]))
    if sys.argv[1:2] == ["ablation"]:
        del sys.argv[1]
        runpy.run_module("tiny_shapes.ablation", run_name="__main__", alter_sys=True)
        sys.exit()
    warnings.warn("ming_core.training is now tiny_shapes.training: use the new name", DeprecationWarning, stacklevel=1)
    runpy.run_module("tiny_shapes.training", run_name="__main__", alter_sys=True)
