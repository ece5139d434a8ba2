"""One of the processes that share a run: ``python -m modelopt_lite.experiment.share FOLDER JOBS SHARE``."""

from __future__ import annotations

import sys
from pathlib import Path

from .records import CONFIG
from .runner import run_experiment

if __name__ == "__main__":
    folder, jobs, share = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    run_experiment(folder / CONFIG, resume=folder, jobs=jobs, share=share)
