"""SimVQ (arXiv 2411.02038) and the authors' VAEVQ (2511.06863): Open-MAGVIT2's network, SimVQ's codebook.

Both are Lightning checkpoints with averaged weights beside the raw ones (``model_ema``, names without dots). The
network has no attention, convolutions of residual blocks without bias, a 1x1 convolution before the latent and no
``quant_conv``; it is this package's with ``resampling: magvit``, zeros for the missing biases and around that kernel,
and a 1x1 convolution that changes nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from torch import Tensor

from vaevq_med.foreign.base import Adopted, AdoptOptions, Kind
from vaevq_med.foreign.converted import adopted, convolutions
from vaevq_med.foreign.errors import ForeignError
from vaevq_med.foreign.taming import SPARE
from vaevq_med.foreign.vqgan import Halves, read_halves
from vaevq_med.foreign.weights import Tensors

_RULES = (
    (r"^(encoder|decoder)\.mid_block\.0\.", r"\1.mid.block_1."),
    (r"^(encoder|decoder)\.mid_block\.1\.", r"\1.mid.block_2."),
    (r"\.downsample\.(weight|bias)$", r".downsample.conv.\1"),
    (r"\.upsample\.conv1\.", ".upsample.conv."),
)
_AVERAGES = "model_ema."


class SimVQRelease(Kind):
    """SimVQ of images."""

    name = "simvq"
    title = "SimVQ, the authors' release"
    source = "a Lightning checkpoint of an image tokenizer"
    license = "see the repository and the model's page"
    variational: ClassVar[bool] = False
    image_size: ClassVar[int] = 128

    def read(self, source: Path, options: AdoptOptions) -> Adopted:
        """Read a checkpoint.

        Raises:
            ForeignError: it is another network's.
        """
        expected = f"{self.title} (encoder, decoder, quantize.embedding_proj)"
        tensors = Tensors.read(source, expected)
        halves, state = self._read(tensors)
        size, width = tensors.shape("quantize.embedding.weight", None, None)
        averages = tensors.below(_AVERAGES)
        averaged = None
        if len(averages):
            names = {name.replace(".", ""): name for name in tensors.names()}
            pairs = ((names.get(name), averages.take(name)) for name in averages.names())
            own = {name: value for name, value in pairs if name is not None}
            averaged = self._read(tensors.with_tensors(own))[1]
        quantizer = {
            "_target_": "vaevq_med.networks.quantizers.SimVQ",
            "num_embeddings": size,
            "embedding_dim": width,
            "trainable_basis": self.variational,
        }
        return adopted(
            source,
            options,
            halves,
            state,
            quantizer,
            embedding_dim=width,
            image_size=self.image_size,
            variational=self.variational,
            averaged=averaged,
        )

    def _read(self, given: Tensors) -> tuple[Halves, dict[str, Tensor]]:
        """Encoder and decoder, and all tensors."""
        tensors = given.renamed(_RULES)
        halves = read_halves(tensors, resampling="magvit", biased=False)
        if halves.latent != halves.codes * (2 if self.variational else 1):
            wanted = "mean and log variance of as many as" if self.variational else "as many as"
            raise ForeignError(
                f"{given.path}: found an encoder of {halves.latent} channels and a decoder of {halves.codes}, expected "
                f"{wanted} the decoder takes"
            )
        state = {**halves.state, **convolutions(tensors, halves)}
        for name in [name for name in state if name.startswith("decoder.layers.") and name.endswith(".conv.weight")]:
            state[name] = _shuffled(state[name])
            state[name.replace("weight", "bias")] = _shuffled(state[name.replace("weight", "bias")])
        state["quantizer.basis"] = tensors.take("quantize.embedding.weight")
        for part in ("weight", "bias"):
            state[f"quantizer.projection.{part}"] = tensors.take(f"quantize.embedding_proj.{part}")
        tensors.check_all_taken(SPARE)
        return halves, state


class VAEVQRelease(SimVQRelease):
    """The authors' VAEVQ: an encoder of means and log variances, a decoder of half the width, a trained basis."""

    name = "vaevq"
    title = "VAEVQ, the authors' release"
    variational = True
    image_size = 256


def _shuffled(tensor: Tensor) -> Tensor:
    """Output channels of depth-to-space, the place in the 2x2 pixels first, in the order of ``pixel_shuffle``.

    >>> import torch
    >>> _shuffled(torch.arange(8)).tolist()
    [0, 2, 4, 6, 1, 3, 5, 7]
    """
    return tensor.unflatten(0, (4, -1)).transpose(0, 1).flatten(0, 1)
