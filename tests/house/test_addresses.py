"""Addresses that users know, in overlays, configurations and code, lead to where things have moved."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys

import pytest
from monai.bundle import ConfigParser

KNOWN = {
    "data": (
        "LoadSliced",
        "LoadPhotograph",
        "SliceDataset",
        "TokenDataset",
        "ResumableBatchSampler",
        "load_token_store",
    ),
    "engines": ("TokenizerTrainer", "EvaluationHandler", "StoredTokenizer", "MLflowTracker", "default_device", "run"),
    "inferers": ("ldm_scheduler", "generate_indices", "generate_images", "draw_indices"),
    "errors": ("VaevqMedError", "DataError", "MissingWeightsError", "ItemError"),
    "outputs": ("LossOutput", "Posterior", "QuantizerOutput", "TokenizerOutput"),
    "resources": ("bundle_path", "recipe_path"),
    "networks.quantizers.factorized": ("FactorizedQuantizer",),
    "networks.modulated_decoder": ("ModulatedDecoder", "ModulatedNorm"),
}


@pytest.mark.parametrize("address", list(KNOWN))
def test_an_old_address_gives_what_has_moved(address: str) -> None:
    module = importlib.import_module(f"vaevq_med.{address}")
    for name in KNOWN[address]:
        found = getattr(module, name)
        assert found.__module__.startswith("vaevq_med.")
        assert found.__module__ != f"vaevq_med.{address}"


@pytest.mark.parametrize("address", ["data", "engines", "inferers"])
def test_every_listed_name_is_there(address: str) -> None:
    module = importlib.import_module(f"vaevq_med.{address}")
    for name in module.__all__:
        assert getattr(module, name) is not None
    assert dir(module) == sorted(module.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = module.nothing


def test_a_configuration_may_name_them() -> None:
    parser = ConfigParser(
        {
            "imports": ["$import vaevq_med.engines as engines"],
            "schedule": {"_target_": "vaevq_med.inferers.ldm_scheduler", "num_train_timesteps": 10},
            "device": "$engines.default_device().type",
        }
    )
    assert parser.get_parsed_content("schedule").num_train_timesteps == 10
    assert parser.get_parsed_content("device") in ("cpu", "cuda")


def test_a_room_opens_without_what_is_in_it() -> None:
    program = "import sys, vaevq_med.training, vaevq_med.images, vaevq_med.engines; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("room", ["generation", "evaluation", "losses", "metrics", "networks", "trained", "training"])
def test_no_name_of_a_room_is_one_of_its_modules(room: str) -> None:
    """Importing the module would put it in the place of what the room's table gives."""
    package = importlib.import_module(f"vaevq_med.{room}")
    modules = {module.name for module in pkgutil.iter_modules(package.__path__)}
    assert modules
    assert not modules & set(package.__all__)
