"""Modules that the processes of a test import."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
