"""A process that waits for work of the first one for longer than a step may last."""

from __future__ import annotations

import datetime
import time

from gpt2.training.distributed import join_processes

if __name__ == "__main__":
    with join_processes("cpu", timeout=datetime.timedelta(seconds=1)) as processes:
        if processes.is_first:
            time.sleep(2.5)
        processes.wait_for_work()
