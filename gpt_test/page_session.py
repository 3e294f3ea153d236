"""Run the Python blocks of one page in one namespace: JSON texts come in, and [what was printed, traceback] go out."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import traceback
import warnings


def main() -> None:
    """Answer each line of standard input, until it ends. Warnings are errors in the blocks."""
    warnings.simplefilter("error")
    answers, names = sys.stdout, {"__name__": "__main__"}
    for line in sys.stdin:
        printed, problem = io.StringIO(), ""
        with contextlib.redirect_stdout(printed):
            try:
                exec(compile(json.loads(line), "<block>", "exec"), names)
            except BaseException:
                problem = traceback.format_exc()
        answers.write(json.dumps([printed.getvalue(), problem]) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
