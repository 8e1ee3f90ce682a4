"""`trak demo`: train, attribute, evaluate and report on small real data, on a CPU, without a download."""

from trak.demo.result import DemoResult
from trak.demo.run import run
from trak.demo.settings import Settings

__all__ = ["DemoResult", "Settings", "run"]
