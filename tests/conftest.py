import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: threads would only wait
# Some virtual machines advertise AMX and fault on its bfloat16 kernels.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

pytest_plugins = ["pytester"]
