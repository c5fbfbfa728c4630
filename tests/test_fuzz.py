"""The fuzzers in their short form, and that each of them sees what it is there to find."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import fuzz, fuzz_decoders, fuzz_strangers
from bench.fuzz_callers import CALLERS, Account, assault
from bench.fuzz_decoders import BODY_LIMITS, Broken
from bench.injection import Injection
from gossip import protocol
from gossip.protocol import OPENING_BYTES, PROOF_BYTES, encode_opening

ROOT = Path(__file__).parents[1]


@pytest.mark.injects(Injection.HUGE_LENGTH, Injection.PICKLE)
def test_decoders_raise_only_their_own_errors_for_mutated_input():
    figures = fuzz_decoders.fuzz(20_000, seed=0)
    assert figures["inputs"] >= 20_000
    assert figures["largest_read"] <= max(BODY_LIMITS.values()) + protocol.MAC_BYTES
    decoders = figures["decoders"]
    assert all(part["inputs"] > 500 and part["memory_sampled"] > 10 for part in decoders.values())
    assert {name for name, part in decoders.items() if not part["accepted"]} == {"handshake"}
    # Inputs get past each check that comes before another.
    assert {"OVERSIZE", "BAD_SEQUENCE", "BAD_MAC"} <= set(decoders["frame"]["faults"])
    assert {"OVERSIZE", "MALFORMED, no JSON", "MALFORMED"} <= set(decoders["resealed frame"]["faults"])
    assert {"BAD_MAGIC", "WRONG_VERSION", "WRONG_SECRET"} <= set(decoders["handshake"]["faults"])


def any_form(monkeypatch):
    """Repeated keys and spaces pass."""
    require = protocol._require
    monkeypatch.setattr(
        protocol,
        "_require",
        lambda good, name, expected, got: require(good or "canonical" in expected, name, expected, got),
    )


def higher_limits(monkeypatch):
    """Longer bodies are asked for."""
    monkeypatch.setattr(protocol, "_KINDS", tuple((kind, 100 * limit) for kind, limit in protocol._KINDS))


def another_error(monkeypatch):
    """What is no JSON raises what json does."""
    decode = protocol.decode
    monkeypatch.setattr(protocol, "decode", lambda kind, body: json.loads(body) and decode(kind, body))


def large_allocation(monkeypatch):
    """An opening takes a megabyte."""
    decode = fuzz_decoders.decode_opening
    monkeypatch.setattr(fuzz_decoders, "decode_opening", lambda message: bytearray(10**6) and decode(message))


def any_proof(monkeypatch):
    """A handshake asks for no secret."""
    monkeypatch.setattr("gossip.handshake._check", lambda got, expected: None)


def any_entry(monkeypatch):
    """The registry believes what it reads."""
    monkeypatch.setattr("gossip.registry._expect", lambda condition, what: None)


@pytest.mark.parametrize(
    "plant",
    [any_form, higher_limits, another_error, large_allocation, any_proof, any_entry],
    ids=lambda one: one.__name__,
)
def test_decoder_fuzzing_finds_a_planted_defect(monkeypatch, plant):
    plant(monkeypatch)
    with pytest.raises(Broken):
        fuzz_decoders.fuzz(20_000, seed=0, shrink=False)


def test_decoder_fuzzing_writes_its_figures(tmp_path):
    output = tmp_path / "figures.json"
    command = ["-m", "bench.fuzz", "decoders", "--inputs", "300", "--output", str(output)]
    run = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    figures = json.loads(output.read_text())
    assert figures["inputs"] >= 300 and figures["command"].startswith("python -m bench.fuzz decoders --inputs 300")
    assert {"hardware", "versions", "inputs_per_second"} <= set(figures)
    assert "resealed frame" in run.stdout


@pytest.mark.injects(Injection.SLOW_HANDSHAKE, Injection.REPLAYED_MESSAGE)
def test_strangers_are_never_let_in_and_leave_nothing_behind(text, tmp_path):
    work = fuzz_strangers.measure(tmp_path, text, connections=120, rate=30.0, seconds=2.0)
    figures = asyncio.run(work)
    assert figures["connections"] == 120 and figures["unreached"] == 0
    assert not any(figures["accepted"].values()), figures["accepted"]
    assert all(counts["connections"] == 20 for counts in figures["by_kind"].values())
    for kind in ("garbage", "replay", "wrong secret"):
        assert figures["by_kind"][kind]["closed_by_the_rank"] > 14
    assert figures["failures_counted"] > 90 and figures["lines_logged"] < 50
    before, after = figures["resources"]["before"], figures["resources"]["after"]
    assert after["descriptors"] == before["descriptors"] and after["threads"] == before["threads"]
    assert after["rss"] - before["rss"] < 50e6
    assert all(cost["hostile_to_calm"]["median"] > 0 for cost in figures["costs"].values())
    assert "accepted: 0" in fuzz.strangers_table(figures)


def test_strangers_that_hear_more_than_a_nonce_are_counted():
    async def believe(reader, writer):
        """A rank that takes any proof."""
        try:
            await reader.readexactly(OPENING_BYTES)
            writer.write(encode_opening(bytes(32)))
            await reader.readexactly(PROOF_BYTES)
            writer.write(bytes(PROOF_BYTES))
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def run():
        server = await asyncio.start_server(believe, "127.0.0.1", 0)
        async with server:
            recording = encode_opening(bytes(32)) + bytes(PROOF_BYTES)
            await assault(server.sockets[0].getsockname(), 2 * len(CALLERS), 20.0, recording, account)

    account = Account()
    asyncio.run(run())
    assert account.connections == dict.fromkeys(CALLERS, 2)
    assert account.accepted == 6  # whoever sends as much as an opening and a proof, at once
