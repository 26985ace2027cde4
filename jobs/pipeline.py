"""`tuneloop run` as a Ray job.

Usage: `ray job submit --working-dir . -- python jobs/pipeline.py CONFIG.yaml [key=value …]`
"""

import sys

from tuneloop.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
