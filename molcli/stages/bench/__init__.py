"""Bench: a Mixture of Layers model's speed beside a dense one's, on the machine at hand."""

from molcli.stages.bench.measure import SECTIONS, Report, Row
from molcli.stages.bench.models import BenchmarkPair, open_benchmark_pair
from molcli.stages.bench.run import bench

__all__ = ["SECTIONS", "BenchmarkPair", "Report", "Row", "bench", "open_benchmark_pair"]
