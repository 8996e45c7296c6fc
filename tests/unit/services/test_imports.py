"""torch takes seconds and hundreds of megabytes to import: who steps no model does not."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["services.cli", "services.app"])
def test_it_comes_without_torch(module):
    said = f"import sys, {module}; print([name for name in ('torch', 'torchvision') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]", f"python -X importtime -m {module} tells who imports it"
