"""Tiny random models with a byte-level tokenizer, saved once a session."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import tiny
import torch

if not torch.cuda.is_available():
    # read when Triton is imported, which nothing has done yet
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def seeded():
    """What a test draws does not depend on the tests that ran before it in its process."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory):
    """Directory of a byte-level tokenizer (256 bytes and three special tokens) with a template."""
    return tiny.save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory, tiny_tokenizer):
    """Directory of a random Llama with four layers."""
    return tiny.save_llama(tmp_path_factory.mktemp("teacher"), tiny_tokenizer, layers=4, seed=0)


@pytest.fixture(scope="session")
def tiny_student(tmp_path_factory, tiny_tokenizer):
    """Directory of a random Llama with two layers."""
    return tiny.save_llama(tmp_path_factory.mktemp("student"), tiny_tokenizer, layers=2, seed=1)


@pytest.fixture(scope="session")
def writer(tmp_path_factory, tiny_tokenizer):
    """Directory of a model that writes lower-case letters and ends a turn every dozen tokens."""
    return tiny.save_writer(tmp_path_factory.mktemp("writer"), tiny_tokenizer)


@pytest.fixture
def autocast():
    """Turns a GPU's autocast on, without a GPU, until the test ends."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")

    def turn_on(dtype):
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", dtype)

    yield turn_on
    torch.set_autocast_enabled("cuda", before[0])
    torch.set_autocast_dtype("cuda", before[1])
