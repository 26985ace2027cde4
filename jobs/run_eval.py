"""`tuneloop evaluate` as a Ray job.

Usage: `ray job submit --working-dir . -- python jobs/run_eval.py CONFIG.yaml [key=value …]`
"""

import sys

from tuneloop.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
