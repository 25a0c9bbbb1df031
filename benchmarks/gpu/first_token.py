"""One process from its start to its first token, as a child of `graphs`. Prints one line of JSON: what was reached when.

`python -m benchmarks.gpu.first_token --config tiny --device cpu [--capture-first 40] [--folder PATH]`. Times are seconds
since `--begin` on Linux's monotonic clock, which parent and child share.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """What it needs is imported inside: the time of the imports is part of the answer."""
    stamps = {"interpreter": time.perf_counter()}
    from benchmarks.gpu.files import load_folder
    from benchmarks.gpu.keys import step_keys
    from benchmarks.gpu.models import make_loaded, random_prompt
    from benchmarks.gpu.report import device_of, dtype_of, make_parser, run_ahead_of
    from benchmarks.gpu.service import failures, make_settings, run, serving

    stamps["imports"] = time.perf_counter()
    parser = make_parser("One process from its start to its first token.")
    parser.add_argument("--begin", type=float, default=stamps["interpreter"])
    parser.add_argument("--prompt", type=int, default=100)
    parser.add_argument("--capture-first", type=int, default=0, help="graphs to capture before the request is sent")
    parser.add_argument("--folder", type=Path, help="read the weights from these files instead of making them")
    arguments = parser.parse_args(argv)
    device, dtype = device_of(arguments), dtype_of(arguments)
    if arguments.folder is None:
        loaded = make_loaded(arguments.config, device=device, dtype=dtype)
    else:
        loaded = load_folder(arguments.folder, arguments.config, device=device, dtype=dtype)
    stamps["model"] = time.perf_counter()

    async def first() -> None:
        settings = make_settings(loaded, num_slots=64, kv_tokens=8192)
        async with serving(loaded, settings, run_ahead=run_ahead_of(arguments)) as service:
            stamps["engine"] = time.perf_counter()
            if arguments.capture_first:
                infos = await service.warm(step_keys(service)[: arguments.capture_first])
                if failed := failures(infos):
                    raise SystemExit(f"graphs were not captured: {failed}")
                stamps["captured"] = time.perf_counter()
            prompt = random_prompt(arguments.prompt, loaded.model.vocabulary_size, random.Random(arguments.seed))
            completion = await service.complete(service.request(prompt, 2))
            stamps["first_token"] = completion.token_seconds[0]

    run(first)
    sys.stdout.write(json.dumps({name: moment - arguments.begin for name, moment in stamps.items()}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
