"""`tuneloop serve` as a Ray job.

Usage: `ray job submit --working-dir . -- python jobs/serve.py CONFIG.yaml [key=value …]`
"""

import sys

from tuneloop.cli import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
