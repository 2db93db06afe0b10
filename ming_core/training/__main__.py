"""`python -m ming_core.training` runs `python -m tiny_shapes.training`, its new name, for one more release."""

import runpy

runpy.run_module("tiny_shapes.training", run_name="__main__", alter_sys=True)
