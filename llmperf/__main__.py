"""`python -m llmperf`."""

import sys

from llmperf.study.cli import main

if __name__ == "__main__":
    sys.exit(main())
