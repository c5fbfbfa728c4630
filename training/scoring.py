"""How well a model predicts a file, in bits per byte; and bytes fed to a model in pieces, as scoring and prompts are.

Shape letters: B lanes, T bytes of a piece, S = T + 1, V byte values.
"""

import math
import mmap
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from mingru.minLM import MinLM, MinLMState
from runtime.errors import UserError

CHUNK = 2048  # bytes a forward pass takes at once: bounds the memory of long prompts and files


@torch.inference_mode()
def score(model: MinLM, path: Path, delimiter: int | None) -> float:
    """Mean bits per byte of a file's second to last byte, each given those before it in its document; UserError.

    The first byte has nothing to be predicted from. A document ends with its delimiter, as in training.
    """
    try:
        with open(path, "rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if len(content) < 2:
            raise ValueError("a single byte")
    except (OSError, ValueError) as error:  # an empty file cannot be mapped: ValueError
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"expected a readable file of 2 bytes or more, got {path} ({reason}): choose another") from None
    with content:
        return _score(model, content, delimiter)


def _score(model: MinLM, content: mmap.mmap, delimiter: int | None) -> float:
    targets = len(content) - 1
    nats, state = 0.0, None
    with tqdm(total=targets, unit="B", unit_scale=True, disable=None) as progress:
        for start in range(0, targets, CHUNK):
            stop = min(start + CHUNK, targets)
            ids_1S = torch.frombuffer(bytearray(content[start : stop + 1]), dtype=torch.uint8).unsqueeze(0)
            logits_1TV, state = advance(model, ids_1S[:, :-1], state, delimiter)
            losses_T = F.cross_entropy(
                logits_1TV[0].float(), ids_1S[0, 1:].long().to(logits_1TV.device), reduction="none"
            )
            nats += losses_T.double().sum().item()
            if not math.isfinite(nats):
                raise UserError(
                    f"expected finite losses, got {nats} in the first {stop + 1} bytes of a file: the model's weights "
                    "are broken, or need a wider --dtype"
                )
            progress.update(stop - start)
    return nats / targets / math.log(2)


def advance(model: MinLM, ids_BT: Tensor, state: MinLMState | None, delimiter: int | None) -> tuple[Tensor, MinLMState]:
    """Logits (B, T, V) after each of these bytes, which are in host memory, and the state after the last.

    A document starts at each delimiter among them, as in training.
    """
    starts_BT = None if delimiter is None else ids_BT == delimiter
    device = model.token_emb.weight.device
    reset_BT = starts_BT.to(device) if starts_BT is not None and starts_BT.any() else None
    return model(ids_BT.to(device), state, reset_BT)
