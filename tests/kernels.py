"""Marks for tests of kernels that older versions of torch lack; without them weights are multiplied otherwise."""

import pytest
import torch
import torch.nn.functional as F

int4_kernel = pytest.mark.skipif(
    not hasattr(torch, "_convert_weight_to_int4pack_for_cpu"), reason="torch before 2.6 has no int4 kernel for CPUs"
)
grouped_product = pytest.mark.skipif(
    not (hasattr(F, "grouped_mm") or hasattr(torch, "_grouped_mm")), reason="torch before 2.8 has no grouped product"
)
