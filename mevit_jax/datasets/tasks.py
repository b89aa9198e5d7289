"""Work on many videos, split into tasks of some hundred videos; each task is done once and leaves a manifest.

In a dataset's directory, `manifests/` holds one JSON file per finished task, and `in_progress/`, which exists while
tasks run, one small file per running task. All communication between processes and machines goes through these files,
so that nothing is lost when any of them stops.
"""

from collections.abc import Callable, Mapping
from typing import Any

MANIFESTS = 'manifests'
_STOP = 'stop'  # a file in in_progress/: running tasks stop when it exists

Row = dict[str, Any]  # a manifest's entry for a video: its example, with `bytes` in place of `video`
ProgressCallback = Callable[[int, int], None]  # (done, total)
# Arguments: reason of each dead video by id, number of all videos. Raises a UserError if too many are dead.
Check = Callable[[Mapping[str, str], int], None]
