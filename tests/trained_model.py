"""The trained model and its text, where they are beside the repository; `quickstart` loads one and cuts the other."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tqdm")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import quickstart  # noqa: E402, F401

MODELS = ROOT.parent / "shared" / "models"
needs_model = pytest.mark.skipif(not MODELS.exists(), reason="the trained model is not beside the repository")
