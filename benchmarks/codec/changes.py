"""Changes single bytes of a compressed case, at random, and sees whether ``decompress`` refuses each in one line.

A change that is not refused, that is not told in one line, or after which anything was written, is a fault. Exit code 1
where there is one::

    python benchmarks/codec/changes.py case.vvq --checkpoint outputs/f8/checkpoints/best.pt --output changes.json
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tempfile
import time
from collections import Counter
from pathlib import Path

from vaevq_med.codec.case import read_description
from vaevq_med.codec.container import unpack
from vaevq_med.codec.options import DecompressOptions
from vaevq_med.codec.work import decompress
from vaevq_med.core.errors import VaevqMedError
from vaevq_med.core.files import atomic_write_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="a compressed case")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--changes", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    content, draw = args.file.read_bytes(), random.Random(args.seed)
    described = read_description(args.file.name, content)
    said: Counter[str] = Counter()
    faults = []
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        path, output = Path(name) / "case.vvq", Path(name) / "out"
        for _ in range(args.changes):
            place, flipped = draw.randrange(len(content)), draw.randrange(1, 256)
            path.write_bytes(content[:place] + bytes([content[place] ^ flipped]) + content[place + 1 :])
            try:
                decompress(path, output, DecompressOptions(checkpoint=args.checkpoint, workers=1)).run()
            except VaevqMedError as error:
                line = str(error)
            else:
                line = ""
            if output.exists() or not line or "\n" in line:
                faults.append({"place": place, "flipped": flipped, "said": line, "written": output.exists()})
                print(faults[-1], flush=True)
            found = re.search(r"found (?:its )?(.*?)(?:,| \(|:)", line)
            said[re.sub(r"\d+", "N", found[1]) if found else line] += 1
    told = {
        "command": f"python benchmarks/codec/changes.py case.vvq --checkpoint best.pt --output changes.json "
        f"--changes {args.changes}",
        "case": described["case"],
        "bytes": len(content),
        "parts": {part: len(data) for part, data in unpack(args.file.name, content).items()},
        "seed": args.seed,
        "changes": args.changes,
        "refused": args.changes - len(faults),
        "said": dict(said.most_common()),
        "seconds": round(time.perf_counter() - started, 1),
        "faults": faults,
    }
    atomic_write_text(args.output, json.dumps(told, indent=1) + "\n")
    print(json.dumps({key: told[key] for key in ("case", "bytes", "changes", "refused", "said")}, indent=1))
    raise SystemExit(bool(faults))


if __name__ == "__main__":
    main()
