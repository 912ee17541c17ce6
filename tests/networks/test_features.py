"""Feature networks: offline, frozen, and LPIPS exactly as its own package has it."""

from __future__ import annotations

import os
import pickle
from bisect import bisect_left
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vaevq_med.core.errors import MissingWeightsError, VaevqMedError
from vaevq_med.losses.perceptual import PerceptualLoss
from vaevq_med.networks.features import FeatureNetwork, feature_network
from vaevq_med.networks.outputs import QuantizerOutput, TokenizerOutput
from vaevq_med.networks.weights import WEIGHT_FILES, find_weights, read_weights


@pytest.fixture(autouse=True)
def _no_weights_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


@pytest.fixture(scope="module")
def lite() -> FeatureNetwork:
    return feature_network("efficientnet-lite0")


def images(seed: int = 0, channels: int = 1) -> Tensor:
    return torch.rand(2, channels, 64, 64, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def output_of(reconstruction: Tensor, continuous: Tensor | None) -> TokenizerOutput:
    codes = torch.zeros(2, 1, 1, 1)
    quantizer = QuantizerOutput(codes, codes, torch.zeros(2, 1, 1, 1, dtype=torch.int64))
    return TokenizerOutput(reconstruction, continuous, codes, None, quantizer)


def check_one_pass(network: FeatureNetwork, batch: Tensor) -> None:
    """Maps and vectors of one pass are those of a pass each."""
    maps, pooled = network.layers_and_pooled(batch)
    torch.testing.assert_close(maps, network.layers(batch))
    torch.testing.assert_close(pooled, network.pooled(batch))


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_maps_and_vectors_come_from_one_pass(lite: FeatureNetwork, channels: int) -> None:
    with torch.no_grad():
        check_one_pass(lite, images(0, channels))


@pytest.mark.parametrize("name", sorted(WEIGHT_FILES))
def test_missing_weights_say_what_goes_where(name: str) -> None:
    with pytest.raises(MissingWeightsError) as error:
        feature_network(name)
    message = str(error.value)
    assert WEIGHT_FILES[name].file in message
    assert WEIGHT_FILES[name].sha256 in message
    assert "SHA-256" in message
    assert "~/.cache/vaevq_med/weights" in message
    assert "efficientnet-lite0" in message
    assert "\n" not in message


def test_unknown_network_names_the_others() -> None:
    with pytest.raises(VaevqMedError, match="efficientnet-lite0, vgg, alex"):
        feature_network("vgg19")


def test_a_file_of_another_hash_is_refused_in_the_usual_place(tmp_path: Path) -> None:
    place = tmp_path / "home/.cache/vaevq_med/weights" / WEIGHT_FILES["alex"].file
    place.parent.mkdir(parents=True)
    torch.save({"a": torch.zeros(1)}, place)
    with pytest.raises(MissingWeightsError, match=r"expected 7be5be79\.\.\."):
        find_weights("alex")
    assert find_weights("alex", place) == place


class Malicious:
    """Makes a folder where it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.mkdir, (str(self.place),))


def test_pickled_code_does_not_run(tmp_path: Path) -> None:
    path, trace = tmp_path / "bad.pth", tmp_path / "trace"
    path.write_bytes(pickle.dumps({"features.0.weight": Malicious(trace)}))
    with pytest.raises(MissingWeightsError, match="unreadable"):
        read_weights(path)
    assert not trace.exists()
    pickle.loads(path.read_bytes())  # the file does what it is there for
    assert trace.exists()


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["vgg", "alex", "squeeze"])
def test_lpips_equals_its_own_package(name: str, tmp_path: Path) -> None:
    import lpips
    import torchvision

    torch.manual_seed(0)
    builder = {"vgg": "vgg16", "alex": "alexnet", "squeeze": "squeezenet1_1"}[name]
    backbone = getattr(torchvision.models, builder)(weights=None)
    torch.save(backbone.state_dict(), tmp_path / "backbone.pth")
    ours = feature_network(name, tmp_path / "backbone.pth")
    theirs = lpips.LPIPS(net=name, pnet_rand=True, verbose=False)
    state = theirs.net.state_dict()
    for key in state:
        state[key] = backbone.state_dict()[f"features.{key.split('.', 1)[1]}"]
    theirs.net.load_state_dict(state)
    first, second = images(1, 3), images(2, 3)
    with torch.no_grad():
        reference = theirs.eval()(first, second).flatten()
        torch.testing.assert_close(ours.distance(first, second), reference, rtol=1e-5, atol=1e-6)
        check_one_pass(ours, first)
    assert float(reference.min()) > 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("prefix", ["backbone.", "module.", ""])
def test_radimagenet_takes_its_release_in_either_naming(prefix: str, tmp_path: Path) -> None:
    import torchvision

    torch.manual_seed(0)
    resnet = torchvision.models.resnet50(weights=None)
    names = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
    state = {}
    for key, value in resnet.state_dict().items():
        head, _, tail = key.partition(".")
        if head != "fc":
            number = str(names.index(head)) if prefix == "backbone." else head
            state[f"{prefix}{number}.{tail}"] = value
    torch.save(state, tmp_path / "ResNet50.pt")
    network = feature_network("radimagenet", tmp_path / "ResNet50.pt")
    resnet.fc = torch.nn.Identity()
    with torch.no_grad():
        torch.testing.assert_close(network.pooled(images(0, 3)), resnet.eval()(images(0, 3)))
        check_one_pass(network, images(0, 3))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_inception_loads_a_state_dictionary_of_its_shape(tmp_path: Path) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.manual_seed(0)
    captured: dict[str, Tensor] = {}

    def catch(self: torch.nn.Module, state: dict[str, Tensor], *args: object) -> None:
        captured.update(torch.nn.Module.state_dict(self))

    path = tmp_path / "inception.pth"
    torch.save({}, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", catch, raising=False)
        FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))
    torch.save(captured, path)
    network = feature_network("inception", path)
    pooled = network.pooled(images(0, 3))
    assert pooled.shape == (2, 2048)
    levels = ((images(0, 3) + 1) * 127.5).round().to(torch.uint8)
    network.network.features_list = ["logits_unbiased"]
    torch.testing.assert_close(network.logits(pooled), network.network(levels)[0])
    with pytest.raises(VaevqMedError, match="no perceptual distance"):
        network.layers(images())
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(MissingWeightsError, match="do not fit"):
        feature_network("inception", path)


def test_lite_is_frozen_and_stays_in_evaluation_mode(lite: FeatureNetwork) -> None:
    parent = torch.nn.Sequential(lite).train()
    assert not any(module.training for module in lite.modules())
    assert not any(p.requires_grad for p in parent.parameters())
    assert len(lite.weights_sha256) == 64


def test_lite_features_of_identical_and_of_other_images(lite: FeatureNetwork) -> None:
    x = images()
    assert lite.distance(x, x).tolist() == [0.0, 0.0]
    near, far = lite.distance(x, x + 0.05 * images(1)), lite.distance(x, images(2))
    assert bool((near < far).all())
    # A grayscale image is the color image with equal channels.
    torch.testing.assert_close(lite.pooled(x), lite.pooled(x.expand(-1, 3, -1, -1)))


@pytest.mark.sampledata
def test_lite_knows_photographs(sample_data: Path, lite: FeatureNetwork) -> None:
    """Photographs of one class lie nearer to their own flipped crops than to other photographs."""
    from PIL import Image
    from torchvision.transforms.functional import center_crop, pil_to_tensor

    paths = sorted((sample_data / "imagenet-sample").glob("*/*/*.JPEG"))[::100]
    batch = torch.stack(
        [center_crop(pil_to_tensor(Image.open(p).convert("RGB")), [224, 224]) / 127.5 - 1 for p in paths]
    )
    features = torch.nn.functional.normalize(lite.pooled(batch))
    flipped = torch.nn.functional.normalize(lite.pooled(batch.flip(-1)))
    assert (features @ flipped.T).argmax(1).tolist() == list(range(len(paths)))


def test_perceptual_loss_gradient_and_cost() -> None:
    term = PerceptualLoss()
    seen: list[int] = []
    original = term.features._layers
    term.features._layers = lambda x: (seen.append(len(x)), original(x))[1]  # type: ignore[method-assign]
    target = images().requires_grad_()
    reconstruction, continuous = images(1).requires_grad_(), images(2).requires_grad_()
    value = term(target, output_of(reconstruction, continuous))
    assert seen == [2, 4]
    value.backward()
    assert target.grad is None
    assert float(reconstruction.grad.abs().sum()) > 0
    assert float(continuous.grad.abs().sum()) > 0
    single = [term(target, output_of(x, None)) for x in (reconstruction, continuous)]
    assert value.item() == pytest.approx(float(single[0].detach() + single[1].detach()), rel=1e-5)
    averaged = PerceptualLoss(path_reduction="mean")(target, output_of(reconstruction, continuous))
    assert averaged.item() == pytest.approx(value.item() / 2, rel=1e-5)


@pytest.mark.sampledata
def test_lite_classifies_photographs_in_the_order_of_their_classes(sample_data: Path, lite: FeatureNetwork) -> None:
    """Class numbers follow the sorted WordNet ids, so right answers rise along them; chance rises about 14 times."""
    from PIL import Image
    from torchvision.transforms.functional import center_crop, pil_to_tensor

    files = sorted((sample_data / "imagenet-sample").glob("*/*/*.JPEG"), key=lambda p: p.parent.name)[::10]
    if not files:
        pytest.skip(f"no photographs in {sample_data / 'imagenet-sample'}")
    batch = torch.stack(
        [center_crop(pil_to_tensor(Image.open(p).convert("RGB")), [224, 224]) / 127.5 - 1 for p in files]
    )
    with torch.no_grad():
        answers = lite.network._fc(lite.pooled(batch)).argmax(1).tolist()
    rising: list[int] = []
    for answer in answers:
        place = bisect_left(rising, answer)
        rising[place : place + 1] = [answer]
    assert len(rising) >= 0.75 * len(files)


def test_pickled_code_is_refused_with_one_line(tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Toucher:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return (Path.touch, (marker,))

    path = tmp_path / "bad.pth"
    torch.save({"features.0.weight": Toucher()}, path)
    for name in sorted(WEIGHT_FILES):
        with pytest.raises(MissingWeightsError) as error:
            feature_network(name, path)
        assert str(error.value).startswith(f"{path}: found an unreadable file")
        assert "\n" not in str(error.value)
    assert not marker.exists()


def test_other_weights_are_refused_with_one_line(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save({"features.0.weight": torch.zeros(1), "features.0.bias": torch.zeros(1)}, path)
    for name in ("alex", "squeeze", "radimagenet"):
        with pytest.raises(MissingWeightsError, match=r"other\.pth: found") as error:
            feature_network(name, path)
        assert "\n" not in str(error.value)
    torch.save([torch.zeros(1)], path)
    with pytest.raises(MissingWeightsError, match="found no tensors by name"):
        read_weights(path)
    with pytest.raises(MissingWeightsError, match="found no file"):
        feature_network("alex", tmp_path / "absent.pth")
    with pytest.raises(VaevqMedError, match="expected none"):
        feature_network("efficientnet-lite0", path)
