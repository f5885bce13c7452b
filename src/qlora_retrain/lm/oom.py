"""Recognize out-of-memory and disk-full errors of torch, CUDA's libraries and the operating system.

Training (which then uses smaller micro-batches) and the runner (which reports how the step ended) share these rules.
The module is in a hashed package because it decides how training continues. It does not import torch, so it recognizes
errors by the name of their type and by their text.
"""

from __future__ import annotations

import errno
import os

# The words of torch on a CPU, of Python, of C++ and of CUDA's libraries.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc", "_STATUS_ALLOC_FAILED")
_GPU_WORDS = ("CUDA", "_STATUS_ALLOC_FAILED")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the host or the GPU ran out of memory."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    # Libraries in C++ raise RuntimeError. The text of any other error may quote a row that talks about memory.
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def is_gpu_out_of_memory(error: BaseException) -> bool:
    """Return whether the GPU ran out of memory: torch's own error, or one that names CUDA or its libraries."""
    is_named = type(error).__name__ == "OutOfMemoryError" or any(words in str(error) for words in _GPU_WORDS)
    return is_named and is_out_of_memory(error)


def is_disk_full(error: BaseException) -> bool:
    """Return whether a disk or a quota is full, also where a library's own error quotes the system's message."""
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        return True
    return any(os.strerror(number) in str(error) for number in _DISK_FULL)
