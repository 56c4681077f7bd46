"""int8: store every key and value in a byte, with a scale and a zero point a token and head.

As LMDeploy's `quant_policy=8`, https://lmdeploy.readthedocs.io/en/latest/quantization/kv_quant.html:
asymmetric, the grid of each token and head spans its smallest to its largest channel.
"""

from pytest_kvguard.storage.affine import Affine
from pytest_kvguard.storage.base import Storage


def int8() -> Storage:
    """Store keys and values in 8 bits as they are written, asymmetric per token and head."""
    return Storage(keys=Affine(8), values=Affine(8))
