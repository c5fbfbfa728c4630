"""The measurements of the README that no other test runs, small."""

import sys

from bench import exchange, scan


def test_scan_bench_prints_times_and_memory_of_each_shape(monkeypatch, capsys):
    monkeypatch.setattr(scan, "SHAPES", ((1, 64, 8),))
    monkeypatch.setattr(sys, "argv", ["bench.scan", "--rounds", "2"])
    scan.main()
    first, line = capsys.readouterr().out.splitlines()
    assert first.endswith("float32, 2 rounds") and line.startswith("B1-T64-E8:")
    assert line.count("ours") == line.count("peers") == 2 and "ratio" in line and line.count(" N") == 2


def test_exchange_bench_prints_its_figures(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.exchange", "--megabytes", "1", "--repeats", "1"])
    exchange.main()
    printed = capsys.readouterr().out
    assert printed.startswith("state          13 MB") and "GB/s" in printed and "step boundary" in printed
