"""Checkpoints that are whole or not there, and come back bit for bit or are refused.

A checkpoint is one folder named by its step. Every array is a zarr 3 array in it, which tensorstore
writes: each process its own shards, each chunk a file that ends with the CRC-32C of its content
(the `crc32c` codec). Then process 0 adds `about.json` and gives the folder its name. A write that
is killed or fails leaves the checkpoints before it as they were. `about.json` has

- the step, and every array's dtype, shape, chunks and folder,
- the size of every file and a checksum of its end, so that files which are missing, cut or come
  from elsewhere are found before they are read; tensorstore finds other damage while it reads,
- the data position and what else the caller gave, and a checksum of itself.

Any reader of zarr 3 opens the arrays.
"""

from ._arrays import check_folder as check_folder
from .errors import CheckpointError as CheckpointError, CheckpointMismatch as CheckpointMismatch
from .folder import Checkpoints as Checkpoints, Positioned as Positioned
