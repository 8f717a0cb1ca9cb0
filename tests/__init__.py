"""Tests: a folder for each room of the packages."""

from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent
