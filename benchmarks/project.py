"""Puts the project on the import path: every benchmark imports this before `ming_core`."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILT_IN = ROOT / "models" / "tiny-shapes"

sys.path.insert(0, str(ROOT))
