"""Fixtures for the tests of the model library."""

import pytest


@pytest.fixture
def quantised_as_on_a_gpu(monkeypatch):
    """Int8 goes through the int4 kernel (the CPU's), and few rows through copies of their experts."""
    from ming_univision.ming_core.experts import ExpertPerRow, OneExpert
    from ming_univision.ming_core.quantization import formats, layers

    def can_pack(values, device):
        return values.shape[-2] % formats.ROW_BLOCK == 0 and formats.width_of(values) % 128 == 0

    def serves(self, kind, x, pairs):
        return kind is OneExpert or (kind is ExpertPerRow and self.kernel_serves(x))

    monkeypatch.setattr(layers, "can_pack", can_pack)
    monkeypatch.setattr(layers.QuantizedStackedLinear, "serves", serves)
