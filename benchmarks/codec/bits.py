"""Bits an index of the entropy coders on held-out patients, and what each takes to train, to code and to decode.

The slices of a data set are encoded by a trained tokenizer (once: the indices are kept in ``--work``), a context model
and a LlamaGen are trained on the training patients' indices, and every contrast of every test patient is coded to bytes
and decoded again. What is counted is whole streams; live positions are those within a pixel of what is not background.
A row is printed as it is done; the ideal rows are entropies of the test indices themselves and no coder::

    python benchmarks/codec/bits.py --dataset data/slices256 --checkpoint outputs/f8/checkpoints/best.pt --work bits
    python benchmarks/codec/bits.py ... --training-cases 4 --test-cases 2 --epochs 1 --prior-width 0   # a short look
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from vaevq_med.codec.coders.adaptive import AdaptiveCoder
from vaevq_med.codec.coders.base import IndexCoder
from vaevq_med.codec.coders.context import ContextCoder
from vaevq_med.codec.coders.context_model import load_context_model
from vaevq_med.codec.coders.prior import PriorCoder, background_indices
from vaevq_med.codec.index_model import IndexModelOptions, train_context_model
from vaevq_med.codec.stacks import Stack, encode_stacks, load_stacks, save_stacks
from vaevq_med.networks.generators.llamagen import LlamaGen
from vaevq_med.trained.network import StoredTokenizer


def stacks_of(args: argparse.Namespace, stored: StoredTokenizer, split: str, cases: int) -> list[Stack]:
    """The first cases of a split, encoded, or read from where an earlier call left them."""
    path = args.work / f"{stored.content_hash[7:19]}-{split}.npz"
    if path.is_file():
        known = load_stacks(path)
        names = list(dict.fromkeys(stack.case for stack in known))
        if len(names) >= cases:
            return [stack for stack in known if stack.case in names[:cases]]
    started = time.perf_counter()
    stacks: list[Stack] = []
    for stack in encode_stacks(args.dataset, stored, split):
        if len({*(known.case for known in stacks), stack.case}) > cases:
            break
        stacks.append(stack)
    save_stacks(path, stacks)
    print(f"encoded {split}: {sum(len(s.indices) for s in stacks)} slices, {time.perf_counter() - started:.0f} s")
    return stacks


def number(stacks: Sequence[Stack]) -> int:
    return sum(int(s.layout.live.sum()) * s.layout.num_codebooks for s in stacks)


def entropy(values: np.ndarray) -> float:
    """Bits of integers by their own frequencies."""
    counts = np.unique(values, return_counts=True)[1]
    return float((counts / counts.sum() * np.log2(counts.sum() / counts)).sum())


def measure(coder: IndexCoder, stacks: Sequence[Stack], bits_fixed: float) -> dict[str, object]:
    """Code and decode; the row."""
    size, coding, decoding = [], 0.0, 0.0
    for stack in stacks:
        started = time.process_time()
        data = coder.encode(stack.indices, stack.layout)
        between = time.process_time()
        back = coder.decode(data, stack.layout)
        coding, decoding = coding + between - started, decoding + time.process_time() - between
        if not (back == np.where(stack.layout.live[..., None], stack.indices, 0)).all():
            raise SystemExit(f"{coder.name}: {stack.case} {stack.layout.contrast} did not come back")
        size.append(len(data))
    total = number(stacks)
    by_contrast: dict[str, list[int]] = {}
    for stack, length in zip(stacks, size, strict=True):
        counts = by_contrast.setdefault(stack.layout.contrast, [0, 0])
        counts[0] += 8 * length
        counts[1] += number([stack])
    bits = 8 * sum(size) / total
    return {
        "coder": coder.name,
        "bits_an_index": round(bits, 4),
        "share_of_fixed": round(bits / bits_fixed, 4),
        "by_contrast": {name: round(b / n, 3) for name, (b, n) in by_contrast.items()},
        "coding_s_a_stack": round(coding / len(stacks), 2),
        "decoding_s_a_stack": round(decoding / len(stacks), 2),
    }


def slices_below(tokens: torch.Tensor, stack: Stack) -> torch.Tensor:
    """The indices of the slice with the number before, -1 where the stack has none."""
    found = torch.full_like(tokens, -1)
    follows = np.flatnonzero(np.diff(stack.layout.slices) == 1) + 1
    found[follows] = tokens[follows - 1]
    return found


def train_prior(args: argparse.Namespace, stacks: Sequence[Stack], background: tuple[int, ...]) -> PriorCoder:
    """A LlamaGen on whole slices, background where nothing is live; only live positions count in its loss."""
    contrasts = tuple(sorted({stack.layout.contrast for stack in stacks}))
    layout = stacks[0].layout
    torch.manual_seed(args.seed)
    network = LlamaGen(
        num_embeddings=layout.num_embeddings,
        grid_size=layout.live.shape[1:],
        width=args.prior_width,
        depth=args.prior_depth,
        num_heads=max(1, args.prior_width // 32),
        num_classes=len(contrasts),
        num_codebooks=layout.num_codebooks,
        sees_below=args.prior_below,
        token_dropout=0.0,
        residual_dropout=0.0,
        ffn_dropout=0.0,
    )
    live = np.concatenate([s.layout.live for s in stacks])
    indices = np.concatenate([s.indices for s in stacks])
    tokens = torch.from_numpy(np.where(live[..., None], indices, np.array(background)))
    below = torch.cat(
        [
            slices_below(tokens_of, stack)
            for tokens_of, stack in zip(tokens.split([len(s.indices) for s in stacks]), stacks, strict=True)
        ]
    )
    labels = torch.from_numpy(
        np.concatenate([np.full(len(s.indices), contrasts.index(s.layout.contrast)) for s in stacks])
    )
    counted = torch.from_numpy(live.reshape(len(live), -1).repeat(layout.num_codebooks, axis=1))
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.prior_rate, betas=(0.9, 0.95), weight_decay=0.05)
    steps = max(1, round(args.prior_epochs * len(tokens) / args.prior_batch))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / max(1, steps // 20), 0.5 + 0.5 * math.cos(math.pi * min(1, s / steps)))
    )
    order = torch.cat([torch.randperm(len(tokens)) for _ in range(math.ceil(args.prior_epochs) + 1)])
    started = time.process_time()
    for step in range(steps):
        rows = order[step * args.prior_batch : (step + 1) * args.prior_batch]
        hidden = network.features(tokens[rows], labels[rows], below[rows] if args.prior_below else None)
        mask, flat = counted[rows], tokens[rows].flatten(1)
        loss = torch.zeros(())
        for g, head in enumerate(network.heads):
            chosen = mask[:, g :: layout.num_codebooks]
            logits = head(hidden[:, g :: layout.num_codebooks][chosen])
            targets = flat[:, g :: layout.num_codebooks][chosen]
            loss = loss + F.cross_entropy(logits, targets, reduction="sum") / mask.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 25 == 0 or step == steps - 1:
            print(f"prior: step {step + 1}/{steps}, {float(loss.detach()) / math.log(2):.3f} bits", flush=True)
    size = sum(p.numel() for p in network.parameters())
    print(f"prior: {size} weights, {steps} steps, {time.process_time() - started:.0f} s of one core", flush=True)
    return PriorCoder(network.eval(), contrasts=contrasts, background=background)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder that keeps indices, models and rows")
    parser.add_argument("--training-cases", type=int, default=1000)
    parser.add_argument("--test-cases", type=int, default=1000)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--epochs", type=float, default=4.0)
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--prior-width", type=int, default=128, help="0 leaves the prior out")
    parser.add_argument("--prior-depth", type=int, default=4)
    parser.add_argument("--prior-epochs", type=float, default=4.0)
    parser.add_argument("--prior-batch", type=int, default=8)
    parser.add_argument("--prior-rate", type=float, default=2e-3)
    parser.add_argument("--prior-below", action="store_true", help="the prior sees the indices of the slice below")
    parser.add_argument("--prior-stacks", type=int, default=1000, help="contrasts that the prior is measured on")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    stored = StoredTokenizer(args.checkpoint)
    network = stored.network()
    test = stacks_of(args, stored, "test", args.test_cases)
    layout = test[0].layout
    fixed = float(math.ceil(math.log2(layout.num_embeddings)))
    rows: list[dict[str, object]] = []

    def row(content: dict[str, object]) -> None:
        rows.append(content)
        print(json.dumps(content), flush=True)
        (args.work / "rows.json").write_text(json.dumps(rows, indent=1) + "\n")

    live = np.concatenate([s.indices[s.layout.live].ravel() for s in test])
    row(
        {
            "tokenizer": stored.content_hash[:19],
            "iteration": stored.iteration,
            "cases": len({s.case for s in test}),
            "stacks": len(test),
            "live_indices": number(test),
            "fixed_bits": fixed,
            "entropy_bits": round(entropy(live), 4),
            "perplexity": round(2 ** entropy(live), 1),
            "used": len(np.unique(live)),
        }
    )
    row(measure(AdaptiveCoder(), test, fixed))
    training = stacks_of(args, stored, "training", args.training_cases)
    path = args.work / f"{stored.content_hash[7:19]}-context.safetensors"
    options = IndexModelOptions(hidden=args.hidden, epochs=args.epochs, batch_size=args.batch_size, seed=args.seed)
    started = time.process_time()
    model = train_context_model(
        training,
        tokenizer=stored.content_hash,
        codebook=network.quantizer.codebook(),
        options=options,
        on_step=lambda s, n, b: print(f"context: step {s}/{n}, {b:.3f} bits", flush=True) if s % 50 in (0, 1) else None,
    )
    model.save(path)
    spent = time.process_time() - started
    trained_on = {
        "training_cases": len({s.case for s in training}),
        "training_indices": number(training),
        "training_s": round(spent),
        "model_bytes": path.stat().st_size,
    }
    row({**measure(ContextCoder(load_context_model(path)), test, fixed), **trained_on})
    if args.prior_width:
        background = background_indices(
            network, image_size=int(stored.value("image_size")), in_channels=int(stored.value("in_channels"))
        )
        started = time.process_time()
        prior = train_prior(args, training, background)
        spent = time.process_time() - started
        chosen = list(islice(test, args.prior_stacks))
        row(
            {
                **measure(prior, chosen, fixed),
                "stacks": len(chosen),
                "sees_below": args.prior_below,
                "training_s": round(spent),
            }
        )


if __name__ == "__main__":
    main()
