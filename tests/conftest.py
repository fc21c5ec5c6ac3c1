"""What every test starts from."""

from collections.abc import Iterator

import pytest
import torch

import dlrm_rs
from dlrm_rs import _dlrm_rs


def pytest_configure(config: pytest.Config) -> None:
    # Raised within torch's own sparse Adagrad and SparseAdam, once per process.
    config.addinivalue_line("filterwarnings", "ignore:Sparse invariant checks are implicitly disabled:UserWarning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="there is no GPU"))


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


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """Threads of torch that wait for more work would keep a pipeline's from theirs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
