"""Checkpoints by orbax that are whole or not there, and are what was saved or are refused.

A checkpoint is one folder named by its step. Orbax writes the arrays under a temporary name, each
process its own shards; then process 0 adds `about.json` and renames the folder. A write that is
killed or fails leaves the checkpoints before it as they were. `about.json` has

- a fingerprint of every array, made on the devices before the save and compared after a restore,
- the size and SHA-256 of every file, so that damage is found before orbax reads it,
- the data position, the metric and what else the caller gave, and a checksum of itself.

Orbax's `_CHECKPOINT_METADATA` and `commit_success.txt` come after it, and nothing reads them.
"""

from .errors import CheckpointError as CheckpointError, CheckpointMismatch as CheckpointMismatch
from .folder import Checkpoints as Checkpoints, Positioned as Positioned
