"""Memory that one layer frees serves the next."""

import torch

LARGEST = 2**25 - 2**16
"""Bytes of the largest block that glibc learns from, a little less than 32 MiB."""


def keep_freed_memory() -> None:
    """Have malloc keep up to 64 MiB of what is freed, instead of handing it back at once.

    glibc keeps twice the size of the largest block freed so far (mallopt(3), M_MMAP_THRESHOLD),
    which is too little for a layer's intermediate results: every layer then gets them from the
    system anew, page by page, each cleared first. One block that is freed untouched teaches it.
    Elsewhere this does nothing.
    """
    torch.empty(LARGEST, dtype=torch.uint8)
