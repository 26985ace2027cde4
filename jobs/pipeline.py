"""Run `tuneloop run` as a Ray job: `ray job submit -- python jobs/pipeline.py CONFIG.yaml key=value`."""

import sys

from tuneloop.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
