"""Without the OpenMMLab stack these tests cannot even be imported; ``make test`` installs it."""

from importlib.util import find_spec

import pytest

collect_ignore_glob = [] if all(find_spec(name) for name in ("mmengine", "mmcv", "mmseg", "mmdet")) else ["test_*.py"]


@pytest.fixture
def mm_log(caplog):
    """What mmengine's current logger, which hands nothing on, logs during a test."""
    from mmengine.logging import MMLogger

    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)
