"""Every quantizer on fake CUDA tensors: nothing mixes devices, and no shape or branch depends on values.

What would is what a GPU's host has to wait for: a fake tensor has no values, so that it ends in an error here.
"""

from __future__ import annotations

import pytest
import torch
from helpers.quantizer_cases import all_cases
from torch._subclasses.fake_tensor import FakeTensorMode

from vaevq_med.networks.posterior import DiagonalGaussian
from vaevq_med.networks.quantizers import mgvq, nearest_codeword, residual

ALL_CASES = all_cases()


@pytest.mark.parametrize("name", list(ALL_CASES))
@pytest.mark.parametrize("training", [True, False])
def test_a_quantizer_never_makes_the_host_wait(name: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    for module in (residual, mgvq):  # a number that is drawn on the CPU would be a fake one here
        monkeypatch.setattr(module, "number_from_first_process", lambda draw, device: 1.0)
    quantizer = ALL_CASES[name].make().train(training)
    with FakeTensorMode(allow_non_fake_inputs=True):
        quantizer.to("cuda")
        mean, logvar = (torch.randn(2, quantizer.embedding_dim, 8, 8, device="cuda") for _ in range(2))
        posterior = DiagonalGaussian(mean, logvar)
        with quantizer.one_update():
            for _ in range(2):
                output = quantizer(mean, posterior)
        assert output.indices.shape == (2, 8, 8, quantizer.num_codebooks)
        assert output.quantized.shape == output.codes.shape == mean.shape
        codes = quantizer.indices_to_codes(output.indices)
        for tensor in (output.indices, output.quantized, output.codes, codes, *output.losses.values()):
            assert tensor.device.type == "cuda"


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("rows", "codewords"), [(1, 1), (1000, 100), (5000, 16384)])
def test_the_search_never_makes_the_host_wait(rows: int, codewords: int, weighted: bool) -> None:
    with FakeTensorMode():
        latents, codebook = torch.randn(rows, 6, device="cuda"), torch.randn(codewords, 6, device="cuda")
        index = nearest_codeword(latents, codebook, precision=latents.exp() if weighted else None)
        assert (index.shape, index.dtype, index.device.type) == ((rows,), torch.int64, "cuda")
