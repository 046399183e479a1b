"""Fixtures of this room."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.conftest import SHARED
from tests.lit.vlms import shared_llava


@pytest.fixture(scope="session")
def llava() -> Path:
    """A tiny random LLaVA in a Hugging Face directory."""
    return shared_llava()


@pytest.fixture(scope="session")
def photos() -> Path:
    """Flickr8k and NLVR, where the shared data lies beside the checkout."""
    path = SHARED / "lit"
    if not path.is_dir():
        pytest.skip(f"images with language are not here ({path})")
    return path


@pytest.fixture(scope="session")
def easy_vqa() -> None:
    """The installed data set."""
    if importlib.util.find_spec("easy_vqa") is None:
        pytest.skip("easy-VQA is not installed: pip install --no-deps easy-vqa==1.0")
