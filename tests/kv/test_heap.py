import platform
import subprocess
import sys

import pytest

resource = pytest.importorskip("resource")

COUNT = """
import resource, torch
from pytest_kvguard.kv.heap import keep_freed_memory

keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):  # as in a layer, whose results exist side by side
    results = [torch.ones(2**22, dtype=torch.uint8) for _ in range(4)]
    del results
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other libraries keep memory anyway")
def test_what_is_freed_is_not_fetched_page_by_page_again():
    faults = int(subprocess.check_output([sys.executable, "-c", COUNT]))
    assert faults < 2 * 4 * 2**22 / resource.getpagesize()  # not twice what exists at a time
