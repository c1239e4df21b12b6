"""Without the OpenMMLab stack these tests cannot even be imported; ``make test`` installs it."""

from importlib.util import find_spec

import pytest

collect_ignore_glob = [] if all(find_spec(name) for name in ("mmengine", "mmcv", "mmseg", "mmdet")) else ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def _plain_configs():
    """A runner writes its config three times; to lay it out nicely takes seconds each time."""
    from mmengine.config import config

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "FormatCode", lambda text, **_: (text, False))
        yield


@pytest.fixture
def mm_log(caplog):
    """What mmengine's current logger, which hands nothing on, logs during a test."""
    from mmengine.logging import MMLogger

    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)
