"""The recipe of docs/extending.md that needs the OpenMMLab stack."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_dense_head_of_ones_own():
    text = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
    (code,) = (code for code in re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S) if "mmengine" in code)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-"]
    done = subprocess.run(command, input=code, capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "(64, 64)"
