"""The command line: one verb a public function. It parses, calls, and shows.

Exit codes: 0 done; 2 something the user can mend, or an interruption, said in one sentence; anything
else is a bug of ours and comes with a traceback.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def main() -> None:
    """Run the `palinode` command."""
    from palinode.cli.app import app
    from palinode.errors import PalinodeError

    signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = app(standalone_mode=False)
    except PalinodeError as error:
        sys.exit(_refuse(str(error)))
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        if not hasattr(error, "show"):  # a usage error of the parser has one
            raise
        error.show()
        sys.exit(2)
    if code == 130:  # what the parser makes of Ctrl-C
        code = _refuse(
            "interrupted; whatever was finished is kept, and the same command goes on where this one stopped"
        )
    sys.stdout.flush()
    sys.exit(code if isinstance(code, int) else 0)


def _refuse(sentence: str) -> int:
    print(f"palinode: {sentence}", file=sys.stderr)
    return 2


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


# Tokenizers warn about forks that never happen here.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
