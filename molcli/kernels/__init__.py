"""Operations on ragged rows: an eager reference each, and a library's fast path where there is one.

Every operation takes rows laid out block by block (see `molcli.kernels.packed_rows`). The function
in a folder's `__init__.py` picks the path; `reference.py` says what the operation means.
"""
