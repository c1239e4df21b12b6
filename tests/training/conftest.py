"""The training command within the process of the tests, which starts in no time."""

import subprocess

import pytest

from mambascope.commands.train import main


@pytest.fixture
def train_here(here, capfd):
    """What :func:`tests.training.helpers.train` does, without a process of its own, in the test's temporary folder."""

    def train(*args, cwd=here):
        assert cwd == here
        capfd.readouterr()
        try:
            status = main([str(arg) for arg in args])
        except SystemExit as ended:
            status = ended.code
        return subprocess.CompletedProcess(args, status, *capfd.readouterr())

    return train
