"""One process of ``cache_hit.py``: ``python -m benchmarks._cache_hit_process MODEL FOLDER ANSWERS``.

Prints, as JSON, the wall and processor seconds of each answer and where it came from. Before the first answer
it imports what any training script does and no more: what an answer imports is part of its cost.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

import pytest_gputrain


def gpt() -> pytest_gputrain.TrainingCase:
    from pytest_gputrain.reference.gpt import gpt_case

    return gpt_case(4, sequence_length=64)


def gpt2() -> pytest_gputrain.TrainingCase:
    import transformers

    config = transformers.GPT2Config(vocab_size=500, n_embd=128, n_layer=4, n_head=4)

    def batch(batch_size: int, device: Any) -> dict[str, Any]:
        tokens = torch.randint(500, (batch_size, 64)).to(device)
        return {"input_ids": tokens, "labels": tokens.clone()}

    return pytest_gputrain.TrainingCase(
        name="gpt2",
        model=lambda: transformers.GPT2LMHeadModel(config),
        batch=batch,
        loss=lambda model, drawn: model(**drawn).loss,
    )


MODELS = {"GPT of depth 4": gpt, "GPT-2 of transformers": gpt2}


def main(name: str, folder: str, num_answers: str) -> None:
    torch.set_num_threads(1)
    case = MODELS[name]()
    model = case.model()
    wall, processor, sources = [], [], []
    for _ in range(int(num_answers)):
        start, start_cpu = time.perf_counter(), time.process_time()
        from pytest_gputrain.batch.cache import BatchCache  # its import is part of the first answer

        found = pytest_gputrain.find_batch(
            case, model=model, capacity="1GB", max_batch_size=2, cache=BatchCache(Path(folder))
        )
        wall.append(time.perf_counter() - start)
        processor.append(time.process_time() - start_cpu)
        sources.append(found.source)
    print(json.dumps({"wall": wall, "processor": processor, "sources": sources}))


if __name__ == "__main__":
    main(*sys.argv[1:])
