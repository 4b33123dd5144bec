import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # two workers on two cores; children of tests too

import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
