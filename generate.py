"""Write text with a trained model: prompt in, bytes out; or score a file in bits per byte.

Standard output carries exactly the bytes: the prompt, then its continuation as it comes. Several samples follow one
another, all of the same length, with one byte 0x1e between them. Everything else goes to standard error.
"""

import runtime.packages  # noqa: F401  # isort: skip

import argparse
import contextlib
import math
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from mingru.decoder import Decoder
from mingru.graph_decoder import GraphDecoder
from mingru.minLM import MinLM, MinLMState
from mingru.sampling import SamplingOptions, sample
from runtime.allocator import keep_freed_memory
from runtime.arguments import ArgumentParser, as_argument, normalise_flags, run_main
from runtime.devices import check_triton, choose_device
from runtime.errors import UserError
from runtime.stdout import writing_to_stdout
from training.checkpoint import load_for_use
from training.option_values import parse_delimiter
from training.scoring import CHUNK, advance, score

SAMPLE_SEPARATOR = b"\x1e"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def main(argv: list[str]) -> int:
    """Run with these arguments; returns the exit status. Raises UserError."""
    options = parse_options(argv)
    sampling = SamplingOptions(
        options.temperature, options.top_k or None, options.top_p, options.min_p, options.typical_p
    )
    device = choose_device(options.cuda, options.rocm, options.cpu)
    check_triton(device)
    if device.type == "cpu":
        keep_freed_memory()
    if options.score is None:
        prompt = read_prompt(options.prompt, options.prompt_file)
    elif options.prompt is not None or options.prompt_file is not None or options.output_file is not None:
        raise UserError("expected --score alone, got a prompt or --output_file beside it: keep one or the other")
    model, info = load_for_use(options.model, device)
    if model.config.num_tokens != 256:
        raise UserError(
            f"expected a model of 256 byte values, got one of {model.config.num_tokens} tokens: choose another"
        )
    model.to(_DTYPES[options.dtype]).requires_grad_(False)
    print(f"{info['path']}, step {info['step']}, on {device} in {options.dtype}", file=sys.stderr)
    delimiter = getattr(options, "document_delimiter", info["document_delimiter"])
    if options.score is not None:
        bits = score(model, options.score, delimiter)
        return write_to_stdout(f"{bits:.4f} bits per byte\n".encode(), iter(()), samples=1)
    seed = secrets.randbits(32) if options.seed is None else options.seed
    print(f"seed {seed}", file=sys.stderr)
    logits_1V, state = prefill(model, prompt, delimiter)
    lanes = [0] * options.num_samples
    continuation = decode(
        model, logits_1V[lanes], state.lanes(lanes), options.max_length, sampling,
        torch.Generator().manual_seed(seed), delimiter,
    )  # fmt: skip
    if options.output_file is None:
        return write_to_stdout(prompt, continuation, options.num_samples)
    return write_to_files(prompt, continuation, output_paths(options.output_file, options.num_samples))


def parse_options(argv: list[str]) -> argparse.Namespace:
    """The command line; hyphens in flags count as underscores. Raises UserError."""
    parser = ArgumentParser(
        prog="generate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument_group("model").add_argument
    add("--model", type=Path, required=True, metavar="PATH", help="a checkpoint, or a run directory (its best.pt)")
    add("--cuda", action="store_true", help="run on an NVIDIA GPU (default: the best device there is)")
    add("--rocm", action="store_true", help="run on an AMD GPU")
    add("--cpu", action="store_true", help="run on the CPU")
    add("--dtype", choices=list(_DTYPES), default="fp32", help="of weights and activations (default: %(default)s)")
    add(
        "--document_delimiter", type=as_argument(parse_delimiter), default=argparse.SUPPRESS, metavar="N",
        help="byte at which a document ends, in hexadecimal, or none (default: as the model was trained)",
    )  # fmt: skip
    add = parser.add_argument_group("prompt (default: standard input)").add_argument
    add("--prompt", metavar="TEXT", help="the bytes to go on from")
    add("--prompt_file", type=Path, metavar="FILE", help="read them from a file")
    add = parser.add_argument_group("sampling").add_argument
    add("--max_length", type=_whole(0), default=512, metavar="N", help="bytes after the prompt (default: %(default)s)")
    add("--num_samples", type=_whole(1), default=1, metavar="N", help="continuations, in one batch (default: 1)")
    add("--temperature", type=float, default=1.0, metavar="X", help="0: always the likeliest byte (default: 1)")
    add("--top_k", type=_whole(0), default=0, metavar="N", help="only the N likeliest bytes (default: 0, all)")
    add("--top_p", type=float, default=1.0, metavar="X", help="only the likeliest that hold this share (default: 1)")
    add("--min_p", type=float, default=0.0, metavar="X", help="only this share of the likeliest's or more (default: 0)")
    add("--typical_p", type=float, default=1.0, metavar="X", help="only the most typical with this share (default: 1)")
    add("--seed", type=_whole(0, 2**64 - 1), metavar="N", help="same seed, same bytes (default: a new one, shown)")
    add = parser.add_argument_group("output").add_argument
    add(
        "--output_file", type=Path, metavar="FILE",
        help="write there instead; sample.txt becomes sample_1.txt, sample_2.txt ... for several samples",
    )  # fmt: skip
    add(
        "--score",
        type=Path,
        metavar="FILE",
        help="print the file's bits per byte under the model, and write nothing else",
    )
    return parser.parse_args(normalise_flags(argv))


def read_prompt(text: str | None, path: Path | None) -> bytes:
    """The prompt from the flag, the file, or standard input. Raises UserError if there is none, or two."""
    if text is not None and path is not None:
        raise UserError("expected one prompt, got --prompt and --prompt_file: keep one of them")
    if text is not None:
        prompt = os.fsencode(text)
    elif path is not None:
        try:
            prompt = path.read_bytes()
        except OSError as error:
            raise UserError(f"expected a readable prompt file, got {path} ({error.strerror}): check the path") from None
    elif sys.stdin is None or sys.stdin.isatty():
        raise UserError("expected a prompt, got none: give --prompt, --prompt_file, or pipe it in")
    else:
        prompt = sys.stdin.buffer.read()
    if not prompt:
        raise UserError(
            "expected a prompt of at least one byte, got an empty one: the model goes on from its last byte"
        )
    return prompt


@torch.inference_mode()
def prefill(model: MinLM, prompt: bytes, delimiter: int | None) -> tuple[Tensor, MinLMState]:
    """The logits (1, V) after the prompt, and the state."""
    ids_1T = torch.frombuffer(bytearray(prompt), dtype=torch.uint8).unsqueeze(0)
    state = None
    for ids_1C in ids_1T.split(CHUNK, dim=1):
        logits_1CV, state = advance(model, ids_1C, state, delimiter)
    return on_host(logits_1CV[:, -1]), state


@torch.inference_mode()
def decode(
    model: MinLM,
    logits_BV: Tensor,
    state: MinLMState,
    length: int,
    options: SamplingOptions,
    generator: torch.Generator,
    delimiter: int | None,
) -> Iterator[bytes]:
    """Yield `length` times the next byte of every lane; memory does not grow. generator: a CPU one. Raises UserError
    where the logits are not finite."""
    decoder = choose_decoder(model, len(logits_BV))
    for left in range(length - 1, -1, -1):
        ids_B = sample(on_host(logits_BV), options, generator)
        yield bytes(ids_B.tolist())
        if left and decoder:
            logits_BV, state = decoder.step(ids_B, state, None if delimiter is None else ids_B == delimiter)
        elif left:
            logits_B1V, state = advance(model, ids_B.unsqueeze(1), state, delimiter)
            logits_BV = logits_B1V[:, 0]


def on_host(logits_BV: Tensor) -> Tensor:
    """In float32 and host memory. Raises UserError where they are not finite."""
    logits_BV = logits_BV.float().cpu()
    if not math.isfinite(logits_BV.sum().item()):
        raise UserError("expected finite logits, got others: the model's weights are broken, or need a wider --dtype")
    return logits_BV


def choose_decoder(model: MinLM, lanes: int) -> Decoder | GraphDecoder | None:
    """What takes single steps faster than the model's own forward pass on its device; None: nothing does."""
    if Decoder.fits(model, lanes):
        return Decoder(model)
    return GraphDecoder(model, lanes) if GraphDecoder.fits(model) else None


def write_to_stdout(prompt: bytes, continuation: Iterator[bytes], samples: int) -> int:
    """Stream the first sample; the others follow, each after a separator. Ctrl-C ends all of them where they are.

    Raises UserError, ReaderGone.
    """
    status = 0
    others = [bytearray() for _ in range(samples - 1)]
    with writing_to_stdout():
        out = sys.stdout.buffer
        _write(out, prompt)
        try:
            for ids in continuation:
                _write(out, ids[:1])
                for other, byte in zip(others, ids[1:], strict=True):
                    other.append(byte)
        except KeyboardInterrupt:
            status = _INTERRUPTED
        for other in others:
            _write(out, SAMPLE_SEPARATOR + prompt + other)
    return status


def output_paths(path: Path, samples: int) -> list[Path]:
    """`path`, or for several samples path_1, path_2 ... before its suffix. Raises UserError."""
    if not path.name:
        raise UserError(f"expected the name of a file for --output_file, got {path}: choose another")
    if samples == 1:
        return [path]
    return [path.with_name(f"{path.stem}_{number}{path.suffix}") for number in range(1, samples + 1)]


def write_to_files(prompt: bytes, continuation: Iterator[bytes], paths: list[Path]) -> int:
    """Stream each sample to its file. Ctrl-C ends all of them where they are. Raises UserError."""
    try:
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(path, "wb")) for path in paths]
            for file in files:
                _write(file, prompt)
            for ids in continuation:
                for file, byte in zip(files, ids, strict=True):
                    _write(file, bytes([byte]))
    except OSError as error:
        raise UserError(f"expected to write {paths[0]}, got {error}: choose another --output_file") from None
    except KeyboardInterrupt:
        return _INTERRUPTED
    return 0


def _write(file: BinaryIO, content: bytes) -> None:
    file.write(content)
    file.flush()


def _whole(minimum: int, maximum: int = 2**63 - 1):
    def parse(text: str) -> int:
        if not text.isdecimal() or not minimum <= int(text) <= maximum:
            raise argparse.ArgumentTypeError(f"expected a whole number from {minimum} to {maximum}, got {text!r}")
        return int(text)

    return parse


if __name__ == "__main__":
    run_main(main)
