"""Memory of a card: is this error about it?"""

import torch


def is_out_of_memory(error):
    """Is this exception about memory that ran out, on a card or off it?"""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # what torch says on the CPU, and what cuBLAS says where its workspace does not fit
    return any(words in str(error) for words in ("allocate memory", "CUBLAS_STATUS_ALLOC_FAILED"))
