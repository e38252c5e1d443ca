"""Operations on packed rows: a fast path for GPUs, and an eager reference of every one.

A layer with several blocks runs each block on its own tokens. The kernels take the rows of all
blocks in one tensor:

- In training and prefill the rows are sorted by block (`packed_rows`).
- In decoding there are a few rows, in token order, each with a block of its own (`decode_rows`).
  From hundreds of sequences on, some operations choose another way, each in its own folder.

Every operation has a folder:

- `__init__.py` holds the public function, which picks the backend, and its custom operator.
- `reference.py` defines the operation in plain PyTorch. Tests compare every other backend with it.
- `triton_kernels.py`, if there is one, holds Triton kernels and the functions that launch them. It
  is imported only where it is used, because Triton is optional.

`backend.use_triton` says whether a tensor can go to Triton.
"""
