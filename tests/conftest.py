"""What every test starts from."""

from collections.abc import Iterator

import pytest
import torch

import dlrm_rs
from dlrm_rs import _dlrm_rs


def pytest_configure(config: pytest.Config) -> None:
    # Raised within torch's own sparse Adagrad and SparseAdam, once per process.
    config.addinivalue_line("filterwarnings", "ignore:Sparse invariant checks are implicitly disabled:UserWarning")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def engine_settings() -> Iterator[None]:
    """Put threads and level back as they were."""
    threads, level = dlrm_rs.get_num_threads(), dlrm_rs.info()["simd"]
    yield
    dlrm_rs.set_num_threads(threads)
    _dlrm_rs.set_simd(level)
