"""`python -m ming_core.training` runs `python -m tiny_shapes.training`, its new name, for one more release."""

import runpy
import warnings

warnings.warn("ming_core.training is now tiny_shapes.training: use the new name", DeprecationWarning, stacklevel=1)
runpy.run_module("tiny_shapes.training", run_name="__main__", alter_sys=True)
