"""What a bundle calls to start and to run an engine; what goes wrong is told in one line."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.data import set_track_meta
from monai.utils import set_determinism

from vaevq_med.core.components import trust
from vaevq_med.core.errors import VaevqMedError, causes, foreseen
from vaevq_med.core.options import expect, is_int
from vaevq_med.images.manifest import load_manifest
from vaevq_med.networks.initial import built_for_weights
from vaevq_med.trained.device import named_device
from vaevq_med.training import distributed
from vaevq_med.training.checkpoint import resumed_file
from vaevq_med.training.config import check_config
from vaevq_med.training.current import own_config, running_parser
from vaevq_med.training.lists import put_lists

_TRACEBACK = "VAEVQ_MED_TRACEBACK"
_COMPONENT = re.compile(r"Failed to instantiate component '([^']+)'")


@contextlib.contextmanager
def _in_one_line() -> Iterator[None]:
    """End the program with one line on standard error: after a foreseen error with 2, after Ctrl-C with 130."""
    try:
        yield
    except KeyboardInterrupt:
        print("vaevq-med: interrupted; the same command goes on", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        line = foreseen(error)
        if line is None:
            raise
        with contextlib.suppress(OSError):  # the terminal's log may be on the full disk, too
            print(f"vaevq-med: {line}", file=sys.stderr, flush=True)
        raise SystemExit(2) from error


def run(engine: Any) -> None:
    """Run an engine; a foreseen error ends the program with one line on standard error and exit code 2.

    A run that Ctrl-C stopped ends it with exit code 130: training with its checkpoint written.

    Args:
        engine: trainer or evaluator.
    """
    with _in_one_line():
        engine.run()
    if getattr(engine.state, "interrupted", False):
        print(
            f"vaevq-med: interrupted at iteration {engine.state.iteration}; the same command goes on", file=sys.stderr
        )
        raise SystemExit(130)


def _goes_on(parser: ConfigParser) -> bool:
    """Whether the weights of the run's networks come from its own checkpoint."""
    definition = parser.get("checkpoint")
    if not isinstance(definition, Mapping) or not {"directory", "resume"} <= definition.keys():
        return False
    directory, resume = (parser.get_parsed_content(f"checkpoint#{name}") for name in ("directory", "resume"))
    return resumed_file(directory, resume) is not None


def _built(parser: ConfigParser, build: str) -> Any:
    """Build what an id names; the files that its networks start from are not read where the run goes on.

    Raises:
        VaevqMedError: naming the component that the configuration does not build.
    """
    try:
        with built_for_weights() if _goes_on(parser) else contextlib.nullcontext():
            return parser.get_parsed_content(build)
    except Exception as error:
        if foreseen(error) is not None or os.environ.get(_TRACEBACK):
            raise
        chain = list(causes(error))
        reason = chain[-1]
        components = _COMPONENT.findall(" ".join(map(str, chain)))
        said = " ".join(str(reason).split())[:200]
        raise VaevqMedError(
            f"{components[-1] if components else build} cannot be built from this configuration "
            f"({type(reason).__name__}: {said}); expected values that it takes; {_TRACEBACK}=1 shows where it fails"
        ) from error


def initialize(
    *,
    seed: int,
    build: str,
    dataset_dir: str | None = None,
    device: str | torch.device | None = None,
    deterministic: bool = False,
    tf32: bool = True,
    trusted: Any = (),
    config: Mapping[str, Any] | None = None,
) -> None:
    """Check the configuration, set seeds and the process group, and build the engine.

    What goes wrong ends the program with one line on standard error and exit code 2.

    Args:
        seed: seed of the initialization and the noise; further processes draw noise of their own.
        build: id of the engine to build now, e.g. ``train#trainer``, so that its errors are one line too.
        dataset_dir: slice data set that has to exist.
        device: device that has to exist.
        deterministic: ask PyTorch for deterministic algorithms.
        tf32: allow TF32 in matrix products and convolutions on GPUs that have it.
        trusted: packages whose components a checkpoint may name, beside this one and those that are published to it.
        config: configuration to check; by default the running bundle's.
    """
    parser = running_parser()
    with _in_one_line():
        trust(trusted)
        own = own_config()
        if parser is not None:
            put_lists(parser, own)
        check_config(parser.get() if parser is not None and config is None else config or {}, frozenset(map(str, own)))
        expect(is_int(seed, 0, 2**63 - 1), "seed", seed, "a whole number from 0")
        named_device(device)
        if dataset_dir is not None:
            load_manifest(Path(dataset_dir))
        distributed.start_process_group()
        set_track_meta(False)
        set_determinism(seed=None)
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.backends.cudnn.allow_tf32 = tf32
        torch.backends.cudnn.benchmark = not deterministic
        if parser is not None:
            engine = _built(parser, build)
            if distributed.rank() > 0:
                # The networks were made alike; the noise of each process is its own, also after a resume.
                torch.manual_seed(seed + 1_000_003 * distributed.rank() + engine.state.iteration)
