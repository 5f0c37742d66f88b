from collections.abc import Iterator

import pytest
import ray

from ftb_llm.local_ray import private_session


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """A small Ray of the test's own, unless whoever runs the tests has one up in this process already."""
    if ray.is_initialized():
        yield
        return
    with private_session() as folder:  # as a run does it: Ray keeps the first token that a process reads, so every Ray of one process needs the same
        ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="warning", log_to_driver=False, _temp_dir=str(folder))
        try:
            yield
        finally:
            ray.shutdown()
