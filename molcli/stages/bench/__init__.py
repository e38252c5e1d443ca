"""Bench: time a Mixture of Layers model beside a dense one on this machine."""

from molcli.stages.bench.measure import SECTIONS, Report, Row
from molcli.stages.bench.models import BenchmarkPair, open_benchmark_pair
from molcli.stages.bench.run import bench

__all__ = ["SECTIONS", "BenchmarkPair", "Report", "Row", "bench", "open_benchmark_pair"]
