"""`python -m llmperf`."""

import sys

from llmperf.study.cli import entry

if __name__ == "__main__":
    sys.exit(entry())
