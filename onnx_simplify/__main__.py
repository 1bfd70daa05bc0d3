"""``python -m onnx_simplify``."""

from __future__ import annotations

import sys

from onnx_simplify.isolation import Stage, enter, interrupted, isolated


def main() -> int:
    """Run the command line and return its exit code."""

    def work() -> int:
        from onnx_simplify.cli import main as run

        enter(Stage.WORKING)
        return run(sys.argv[1:])

    try:
        return isolated(work)
    except KeyboardInterrupt:
        return interrupted()


if __name__ == "__main__":
    sys.exit(main())
