"""FVQ: the bridge beside PyTorch's own transformer, its start, its kept codebook, and the overlay."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.bundles import quick, train_and_evaluate
from torch import nn

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.quantizers import FVQ


def unfolded(**options: Any) -> FVQ:
    torch.manual_seed(0)
    sizes = {"num_embeddings": 64, "embedding_dim": 3, "patch_size": 2, "width": 8, "num_heads": 2}
    quantizer = FVQ(**{**sizes, **options})
    nn.init.normal_(quantizer.head.weight)
    nn.init.normal_(quantizer.head.bias)
    return quantizer


def reference(quantizer: FVQ) -> torch.Tensor:
    """The codebook by loops over the patches and ``nn.TransformerEncoderLayer``."""
    side, patch, dim = quantizer.side, quantizer.patch_size, quantizer.embedding_dim
    image = quantizer.table.reshape(side, side, dim)
    corners = [(i, j) for i in range(0, side, patch) for j in range(0, side, patch)]
    tokens = torch.stack([quantizer.embed(image[i : i + patch, j : j + patch].flatten()) for i, j in corners])
    for block in quantizer.blocks:
        layer = nn.TransformerEncoderLayer(
            8, 2, 16, dropout=0.0, activation="gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
        )
        layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias = block.qkv.weight, block.qkv.bias
        layer.self_attn.out_proj = block.projection
        layer.linear1, layer.linear2 = block.mlp[0], block.mlp[2]
        tokens = layer(tokens.unsqueeze(0)).squeeze(0)
    patches = quantizer.head(nn.functional.layer_norm(tokens, (8,), eps=1e-6))
    result = torch.empty(side, side, dim)
    for (i, j), values in zip(corners, patches, strict=True):
        result[i : i + patch, j : j + patch] = values.view(patch, patch, dim)
    return result.view(side * side, dim)


def test_the_bridge_is_a_transformer_over_patches() -> None:
    quantizer = unfolded()
    nn.init.normal_(quantizer.table)
    for bias in (p for name, p in quantizer.named_parameters() if name.endswith("bias")):
        nn.init.normal_(bias)
    torch.testing.assert_close(quantizer.codebook(), reference(quantizer), atol=1e-5, rtol=1e-5)
    direction = torch.randn(64, 3)
    found = torch.autograd.grad((quantizer.codebook() * direction).sum(), [*quantizer.parameters()])
    expected = torch.autograd.grad((reference(quantizer) * direction).sum(), [*quantizer.parameters()])
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, atol=1e-4, rtol=1e-4)


def test_one_patch_by_hand() -> None:
    """A bridge of one patch of one codeword and no attention to anything else is a function of that codeword."""
    quantizer = FVQ(num_embeddings=1, embedding_dim=2, patch_size=1, width=2, num_heads=1, depth=1)
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.zero_()
        quantizer.table.copy_(torch.tensor([[3.0, 7.0]]))
        quantizer.embed.weight.copy_(torch.eye(2))
        quantizer.head.weight.copy_(torch.tensor([[2.0, 0.0], [0.0, 5.0]]))
        quantizer.head.bias.fill_(0.5)
    # The block adds nothing; normalized, (3, 7) is (-1, 1).
    torch.testing.assert_close(quantizer.codebook(), torch.tensor([[-1.5, 5.5]]), atol=1e-5, rtol=0)


def test_all_codewords_start_equal_and_the_first_steps_part_them() -> None:
    torch.manual_seed(0)
    quantizer = FVQ(num_embeddings=256, embedding_dim=4, width=32)
    z = torch.randn(4, 4, 8, 8)
    assert not bool(quantizer.codebook().any())
    assert quantizer(z).indices.unique().tolist() == [0]
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=3e-3)
    used = []
    for _ in range(150):
        output = quantizer(z)
        used.append(len(output.indices.unique()))
        optimizer.zero_grad()
        output.losses["codebook"].backward()
        optimizer.step()
    # 256 latents and 256 codewords.
    assert used[0] == 1
    assert used[-1] > 80


def test_the_codebook_is_kept_in_evaluation_until_something_changes() -> None:
    quantizer = unfolded().eval()
    other = unfolded()
    nn.init.normal_(other.table)
    with torch.no_grad():
        kept = quantizer.codebook()
        assert quantizer.codebook() is kept
        assert quantizer.train().codebook() is not kept
        quantizer.eval()
        again = quantizer.codebook()
        assert torch.equal(again, kept)
        quantizer.load_state_dict(other.state_dict())
        torch.testing.assert_close(quantizer.codebook(), other.codebook())
        assert not torch.equal(quantizer.codebook(), kept)
        # An average of weights is updated in place while its network stays in evaluation mode.
        averaged = torch.optim.swa_utils.AveragedModel(
            quantizer, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
        ).eval()
        averaged.update_parameters(quantizer)
        before = averaged.module.codebook()
        quantizer.head.bias.add_(1.0)
        averaged.update_parameters(quantizer)
        torch.testing.assert_close(averaged.module.codebook(), before + 0.5)
        twin = copy.deepcopy(quantizer)
        torch.testing.assert_close(twin.codebook(), quantizer.codebook())
        torch.testing.assert_close(quantizer.double().codebook().float(), twin.codebook())
    assert quantizer.codebook().requires_grad
    assert "_kept" not in str(list(quantizer.state_dict()))


@pytest.mark.peer
def test_it_agrees_with_vector_quantize_pytorch() -> None:
    """Intended differences: its one loss is the sum of both halves; its bridge (a convolution) is replaced by ours."""
    import vector_quantize_pytorch as peer

    ours = unfolded(embedding_dim=4)

    class Bridge(nn.Module):
        def forward(self, embed: torch.Tensor) -> torch.Tensor:
            return ours.codebook().expand_as(embed)

    theirs = peer.VectorQuantize(
        dim=4, codebook_size=64, vq_bridge=Bridge(), rotation_trick=False, accept_image_fmap=True
    )
    generator = torch.Generator().manual_seed(1)
    z, direction = 3 * torch.randn(2, 2, 4, 3, 5, generator=generator)
    first, second = z.clone().requires_grad_(), z.clone().requires_grad_()
    quantized, indices, loss = theirs(first)
    output = ours(second)
    assert len(indices.unique()) > 3
    assert torch.equal(output.indices[..., 0], indices)
    torch.testing.assert_close(output.quantized, quantized)
    torch.testing.assert_close(output.losses["commitment"], loss.reshape(()))
    both = output.losses["codebook"] + output.losses["commitment"]
    expected = torch.autograd.grad((quantized * direction).sum() + loss.sum(), [first, *ours.parameters()])
    found = torch.autograd.grad((output.quantized * direction).sum() + both, [second, *ours.parameters()])
    for own, peers in zip(found, expected, strict=True):
        torch.testing.assert_close(own, peers)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_embeddings": 60}, "num_embeddings is 60 with patch_size 4; expected the square"),
        ({"num_embeddings": 36}, "num_embeddings is 36 with patch_size 4; expected the square"),
        ({"width": 10}, "width a multiple of num_heads"),
        ({"depth": 0}, "depth 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(VaevqMedError, match=said):
        FVQ(**{"num_embeddings": 64, "embedding_dim": 4, **options})


def test_the_overlay_trains_and_evaluates(toy_overrides: dict[str, Any]) -> None:
    overrides = {**quick(toy_overrides), "num_embeddings": 64, "network_def#quantizer#width": 16}
    trainer, _ = train_and_evaluate(overrides, "fvq")
    assert bool(trainer.network.quantizer.head.weight.any())
