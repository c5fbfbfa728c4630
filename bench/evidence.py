"""What a run left behind, judged: checkpoints by their digests, merges by both ends' accounts and by the witnesses."""

import contextlib
import json
import re
import statistics
from collections import Counter
from pathlib import Path

import torch
from blake3 import blake3

from bench.population import ROOT, Population
from bench.provenance import provenance
from bench.witness import WIRE_TYPES, testimony
from runtime.files import atomic_write
from training.checkpoint import CheckpointFile, list_checkpoints, load_for_use, read_checkpoint
from training.data import Corpus, Region, validation_chunks
from training.losses import chunk_loss

RESULTS = ROOT / "bench" / "results"
HELD_OUT_BYTES = 64 * 1024
DIGEST_MARK = b"gruboros blake3 "  # a checkpoint's zip comment: this, 64 hex digits, and nothing after them
MIXED = ("merged", "averaged", "sent", "rolled_back")  # endings of a conversation in which weights arrived
CHANGED = ("merged", "averaged")
SECOND_MOMENTS = "v."  # how their names begin in a checkpoint


def is_whole(path: Path) -> bool:
    """Whether a checkpoint's bytes have the digest that its last bytes tell; the product's own reader is not asked."""
    content = path.read_bytes()
    comment = content[-len(DIGEST_MARK) - 64 :]
    told = comment.removeprefix(DIGEST_MARK)
    return comment != told and blake3(content[: -len(comment) - 2]).hexdigest().encode() == told


def newest_whole(run_dir: Path, rank: int) -> CheckpointFile | None:
    """The rank's whole checkpoint of the latest step; None if it has none. The rank must not be running."""
    own = [file for file in list_checkpoints(run_dir) if file.rank == rank]
    for file in reversed(own):
        with contextlib.suppress(FileNotFoundError):  # the leader has just retired an old one
            if is_whole(file.path):
                return file
    return None


def resumed_from(log: Path, offset: int) -> str | None:
    """What the first process to write in a log behind `offset` says it went on from: a checkpoint's name, "" if none.

    None while there is no such line yet.
    """
    with open(log, errors="replace") as file:
        file.seek(offset)
        for line in file:
            if re.search(r" rank \d+ of \d+ \(", line) and line.endswith("\n"):
                match = re.search(r"checkpoint_rank_\S+\.pt", line)
                return match[0] if match else ""
    return None


def held_out_losses(population: Population, corpus: Path) -> list[float]:
    """Loss in nats per byte of each rank's newest whole checkpoint, all on the same held-out bytes."""
    held_out = Corpus([corpus], 0x1E).split(0.05)[1]
    losses = []
    for rank in range(population.ranks):
        file = newest_whole(population.run_dir, rank)
        if file is not None:
            losses.append(_loss(file.path, held_out))
    return losses


@torch.no_grad()
def _loss(path: Path, held_out: Region) -> float:
    device = torch.device("cpu")
    model = load_for_use(path, device)[0]
    total, count, state = 0.0, 0, None
    for chunk in validation_chunks(held_out, 32, 256, HELD_OUT_BYTES):
        loss, state = chunk_loss(model, chunk, state, device)
        total += float(loss) * chunk.reset_BT.size
        count += chunk.reset_BT.size
    return total / count


def write_result(path: Path, bench: str, content: dict) -> None:
    """A bench's figures as JSON, with what is needed to judge and to repeat them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps({"bench": bench} | provenance(f"bench.{bench}") | content, indent=2) + "\n")


def spread(values: list[float]) -> dict[str, float]:
    """Mean, standard deviation, least and most."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.mean(values), "sd": deviation, "least": min(values), "most": max(values)}


def judge_merges(population: Population) -> dict:
    """Whether any merge was torn or partial, from two sources that do not trust the protocol's own word.

    witnesses: every state that was merged must be, bit for bit, one that some rank held at a step boundary; and weights
    change at no boundary without a report of a merge. Logs: every conversation ends once at each end; where both ends
    tell of one that moved weights, they tell of equally many bytes, and of no fewer than a state has.
    """
    seen = testimony(population.cwd)
    held = set(seen["held"])
    boards = [population.board(rank) for rank in range(population.ranks)]
    rows = [row for row in population.events() if row["exchange_id"] != "NA"]
    ends: dict[str, list[dict]] = {}
    for row in rows:
        ends.setdefault(row["exchange_id"], []).append(row)
    merges = [row for row in rows if row["event"] in CHANGED]
    partners = {id(row): [other for other in ends[row["exchange_id"]] if other is not row] for row in merges}
    confirmed = [row for row in merges if [other["event"] in MIXED for other in partners[id(row)]] == [True]]
    state_bytes = _travelling_bytes(population)
    return {
        "merges_witnessed": len(seen["merge"]),
        "merges_of_a_state_nobody_held": sum(merged not in held for merged in seen["merge"]),
        "boundaries": sum(board.boundaries for board in boards),
        "boundaries_looked_at": sum(board.looked_at for board in boards),
        "boundaries_changed_without_a_merge": len(seen["changed"]),
        "merges_logged": len(merges),
        "confirmed_by_the_sender": len(confirmed),
        "sender_died_first": sum(not partners[id(row)] for row in merges),
        "sender_never_knew": sum([other["event"] for other in partners[id(row)]] == ["failed"] for row in merges),
        "ended_twice": sum(len({row["rank"] for row in both}) < len(both) for both in ends.values()),
        "unequal_bytes": sum(row["bytes"] != partners[id(row)][0]["bytes"] for row in confirmed),
        "fewer_bytes_than_a_state": sum(int(row["bytes"]) < state_bytes for row in merges),
        "endings": dict(Counter(row["event"] for row in rows).most_common()),
        "faults": dict(Counter(row["message"].split(":")[0] for row in rows if row["event"] == "failed").most_common()),
    }


def torn(judged: dict) -> int:
    """How many of judge_merges' figures tell of a merge that was not whole."""
    names = ("merges_of_a_state_nobody_held", "boundaries_changed_without_a_merge", "ended_twice", "unequal_bytes",
             "fewer_bytes_than_a_state")  # fmt: skip
    return sum(judged[name] for name in names)


def mixes(rows: list[dict], begin: float, end: float, endings: tuple[str, ...] = MIXED) -> set[int]:
    """The ranks that completed a conversation in which weights arrived, from `begin` to `end` (Unix time)."""
    return {int(row["rank"]) for row in rows if row["event"] in endings and begin < row["seconds"] <= end}


def _travelling_bytes(population: Population) -> int:
    """Bytes of a state as the run's options let it travel."""
    options = json.loads((population.run_dir / "config.json").read_text())["options"]["population"]
    newest = list_checkpoints(population.run_dir)[-1]
    tensors = read_checkpoint(newest.path, mapped=False)["training"]["tensors"]
    if options["gossip_payload"] == "weights":
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(SECOND_MOMENTS)}
    return sum(tensor.numel() for tensor in tensors.values()) * WIRE_TYPES[options["gossip_wire_dtype"]].itemsize


def final_bytes(population: Population) -> int:
    """Bytes that the ranks' newest whole checkpoints were trained on, each rank's own since it began afresh."""
    files = [newest_whole(population.run_dir, rank) for rank in range(population.ranks)]
    read = (read_checkpoint(file.path, mapped=False) for file in files if file is not None)
    return sum(content["training"]["totals"]["bytes_seen"] for content in read)
